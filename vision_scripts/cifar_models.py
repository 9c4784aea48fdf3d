"""The CIFAR networks of the HAP and EHAP papers as models of Transformers.

Importing this module makes the `Auto` classes know them, so that `AutoModelForImageClassification.from_pretrained`
loads what `save_pretrained` wrote.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from vision_scripts.cifar_blocks import BLOCKS


class CifarResNetConfig(PretrainedConfig):
    """Sizes of a residual network for small images.

    Args:
        block (`str`, *optional*, defaults to `"basic"`): What the stages consist of: `"basic"`, `"preactivation"` or
            `"bottleneck"` (see [`BLOCKS`]).
        depth (`int`, *optional*, defaults to 3): Blocks in each stage.
        widths (`list[int]`, *optional*, defaults to `(16, 32, 64)`): Channels of each stage. From the second one on,
            the first block of a stage halves height and width.
        stem_width (`int`, *optional*): Channels before the first stage; by default those of the first stage.
        padded_shortcut (`bool`, *optional*, defaults to `True`): Whether shortcuts that change sizes pad with zeros.
            Otherwise they are 1x1 convolutions.
        num_channels (`int`, *optional*, defaults to 3): Channels of an image.
        image_size (`int`, *optional*, defaults to 32): Height and width of the images that costs are counted for. The
            network takes images of any size.
        kwargs: Those of `PretrainedConfig`.

    Raises:
        ValueError: If there is no such block, or a size is not positive.
    """

    model_type = "cifar_resnet"

    def __init__(
        self,
        block: str = "basic",
        depth: int = 3,
        widths: tuple[int, ...] | list[int] = (16, 32, 64),
        stem_width: int | None = None,
        padded_shortcut: bool = True,
        num_channels: int = 3,
        image_size: int = 32,
        **kwargs: Any,
    ):
        if block not in BLOCKS:
            raise ValueError(f"CifarResNetConfig knows no block '{block}'; choose one of {', '.join(BLOCKS)}.")
        self.block, self.depth, self.widths = block, depth, list(widths)
        self.stem_width = self.widths[0] if stem_width is None else stem_width
        self.padded_shortcut, self.num_channels, self.image_size = padded_shortcut, num_channels, image_size
        if min(depth, self.stem_width, num_channels, *self.widths) < 1:
            raise ValueError(
                f"The sizes of a CifarResNetConfig must be positive, got depth={depth}, widths={self.widths}, "
                f"stem_width={self.stem_width}, num_channels={num_channels}."
            )
        super().__init__(**kwargs)


# The papers' networks by name. A network of 6n + 2 layers has n blocks of two convolutions in each of three stages.
CIFAR_NETWORKS: dict[str, dict[str, Any]] = {
    "resnet20": {"depth": 3},
    "resnet32": {"depth": 5},
    "resnet56": {"depth": 9},
    "preresnet29": {"block": "bottleneck", "widths": (64, 128, 256), "padded_shortcut": False},
    "wrn-32": {"depth": 5, "widths": (64, 128, 256), "padded_shortcut": False},
    "wrn-28-8": {
        "block": "preactivation",
        "depth": 4,
        "widths": (128, 256, 512),
        "stem_width": 16,
        "padded_shortcut": False,
    },
}


def cifar_config(name: str, **settings: Any) -> CifarResNetConfig:
    """Makes the config of one of the papers' networks.

    Args:
        name (`str`): One of `CIFAR_NETWORKS`.
        settings: Further settings of the config, such as `num_labels`.

    Raises:
        ValueError: If there is no such network.
    """
    if name not in CIFAR_NETWORKS:
        raise ValueError(f"There is no CIFAR network '{name}'; choose one of {', '.join(CIFAR_NETWORKS)}.")
    return CifarResNetConfig(**{**CIFAR_NETWORKS[name], **settings})


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


class CifarResNetForImageClassification(CifarResNetPreTrainedModel):
    """A residual network with a linear classifier.

    Args:
        config (`CifarResNetConfig`): Its sizes, and `num_labels`.
    """

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = CifarResNetModel(config)
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


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig)
AutoModel.register(CifarResNetConfig, CifarResNetModel)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)
