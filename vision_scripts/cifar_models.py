"""The CIFAR networks of the HAP and EHAP papers as models of Transformers.

Importing this module makes the `Auto` classes know them, so that `AutoModelForImageClassification.from_pretrained`
loads what `save_pretrained` wrote, and tells hap_transformers where their channels are.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from hap_transformers import ARCHITECTURES, Architecture, Chain, ChannelNames
from vision_scripts.cifar_blocks import BLOCKS
from vision_scripts.cifar_configs import CifarPreResNetConfig, CifarResNetConfig


class CifarResNetPreTrainedModel(PreTrainedModel):
    """What both model classes share: names, and how new weights are drawn."""

    config_class = CifarResNetConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    _no_split_modules = [block.__name__ for block in BLOCKS.values()]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class CifarResNetModel(CifarResNetPreTrainedModel):
    """A residual network without a head: a 3x3 stem, stages of blocks, the mean over all pixels.

    Args:
        config (`CifarResNetConfig`): Its sizes.
    """

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        make_block = BLOCKS[config.block]
        self.stem = nn.Conv2d(config.num_channels, config.stem_width, 3, padding=1, bias=False)
        blocks, width = [], config.stem_width
        for stage, wider in enumerate(config.widths):
            for number in range(config.depth):
                stride = 2 if stage and not number else 1
                blocks.append(make_block(width, wider, stride, config.padded_shortcut))
                width = wider
        self.blocks = nn.ModuleList(blocks)
        # Blocks that normalize first leave the sum of the last one to be normalized; others need it behind the stem.
        self.pre_activated = make_block.pre_activated
        self.norm = nn.BatchNorm2d(width if self.pre_activated else config.stem_width)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Runs the network.

        Args:
            pixel_values (`torch.Tensor`): Shape `(batch, num_channels, height, width)`.

        Returns:
            `BaseModelOutputWithPooling`: The last block's activations, shape `(batch, channels, height, width)`, and
            their means over all pixels, shape `(batch, channels)`.
        """
        hidden_states = self.stem(pixel_values)
        if not self.pre_activated:
            hidden_states = F.relu(self.norm(hidden_states))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        if self.pre_activated:
            hidden_states = F.relu(self.norm(hidden_states))
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=F.adaptive_avg_pool2d(hidden_states, 1).flatten(1)
        )


class CifarPreResNetModel(CifarResNetModel):
    """A [`CifarResNetModel`] whose norms come before the convolutions.

    Args:
        config (`CifarPreResNetConfig`): Its sizes.
    """

    config_class = CifarPreResNetConfig


class CifarResNetForImageClassification(CifarResNetPreTrainedModel):
    """A residual network with a linear classifier.

    Args:
        config (`CifarResNetConfig`): Its sizes, and `num_labels`.
    """

    backbone_class = CifarResNetModel

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = self.backbone_class(config)
        self.classifier = nn.Linear(config.widths[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Classifies images.

        Args:
            pixel_values (`torch.Tensor`): Shape `(batch, num_channels, height, width)`.
            labels (`torch.Tensor`, *optional*): Numbers of the classes, shape `(batch,)`.

        Returns:
            `ImageClassifierOutput`: Logits, shape `(batch, num_labels)`, and with labels the mean cross-entropy.
        """
        logits = self.classifier(self.backbone(pixel_values, return_dict=True).pooler_output)
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


class CifarPreResNetForImageClassification(CifarResNetForImageClassification):
    """A [`CifarResNetForImageClassification`] whose norms come before the convolutions.

    Args:
        config (`CifarPreResNetConfig`): Its sizes, and `num_labels`.
    """

    config_class, backbone_class = CifarPreResNetConfig, CifarPreResNetModel


for network in (CifarResNetForImageClassification, CifarPreResNetForImageClassification):
    AutoConfig.register(network.config_class.model_type, network.config_class)
    AutoModel.register(network.config_class, network.backbone_class)
    AutoModelForImageClassification.register(network.config_class, network)


def _architecture(*chains: Chain) -> Architecture:
    return Architecture("blocks", {"channels": ChannelNames(chains, "shortcut")})


ARCHITECTURES[CifarResNetConfig.model_type] = _architecture(Chain("conv1", "conv2", ("norm1",), "norm2"))
ARCHITECTURES[CifarPreResNetConfig.model_type] = _architecture(
    Chain("conv1", "conv2", ("norm2",), "norm3"), Chain("conv2", "conv3", ("norm3",))
)
