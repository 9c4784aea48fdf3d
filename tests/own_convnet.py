"""A convolutional model as a user would write it: biases, dilation, several kinds of padding, and no norms."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from convnets import CONVNETS, Chain, ConvNet
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hap_transformers import ARCHITECTURES, Architecture
from hap_transformers.components import names


class OwnConfig(PretrainedConfig):
    model_type = "own_convnet"


class Block(nn.Module):
    """Four convolutions, whose input is added to what the last one gives unless it has a stride."""

    def __init__(self, stride: int):
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, padding="same", dilation=2)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        # With an even kernel one side is padded more than the other.
        self.second = nn.Conv2d(6, 5, (3, 2), padding="same", dilation=(2, 1), bias=False)
        self.third = nn.Conv2d(5, 4, 3, stride, padding=1, padding_mode="reflect")
        self.adds = stride == 1

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        branch = F.silu(self.depthwise(F.silu(self.first(hidden_states))))
        branch = self.third(F.silu(self.second(branch)))
        return hidden_states + branch if self.adds else branch


class OwnConvNetModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.blocks = nn.ModuleList([Block(1), Block(2)])
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_states = self.stem(pixel_values)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states.mean((2, 3))


class OwnForImageClassification(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"

    def __init__(self, config: OwnConfig):
        super().__init__(config)
        self.backbone = OwnConvNetModel(config)
        self.classifier = nn.Linear(4, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None):
        logits = self.classifier(self.backbone(pixel_values))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


class OwnConvNet(ConvNet):
    @property
    def classes(self) -> tuple[type, type]:
        return OwnConfig, OwnForImageClassification


def _chains(inside: str, adds: bool) -> tuple[Chain, Chain]:
    """The chains of a block, which may add its input."""
    first, depthwise, second, third = (inside + path for path in ("first", "depthwise", "second", "third"))
    return Chain(first, (depthwise,), second, 6), Chain(second, (), third, 5, added=first if adds else None)


BLOCKS = (*_chains("backbone.blocks.0.", True), *_chains("backbone.blocks.1.", False))
OWN = OwnConvNet("Own", r"backbone\.blocks\.", BLOCKS)
NETS = {**CONVNETS, "own": OWN}
# For tests that run on all of them, which take long; others run on those of the fixture `net`.
of_all = pytest.mark.parametrize("net", NETS, indirect=True)
# What a user adds to `ARCHITECTURES` under "own_convnet".
CHAINS = (names.Chain("first", "second", ("depthwise",)), names.Chain("second", "third"))
ENTRY = Architecture("blocks", {"channels": names.ChannelNames(CHAINS, added="adds")})


@contextmanager
def own_entry() -> Iterator[None]:
    """Lets the package know the model while the context is open."""
    with mock.patch.dict(ARCHITECTURES, own_convnet=ENTRY):
        yield
