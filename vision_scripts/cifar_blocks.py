"""Residual blocks of the CIFAR networks.

All blocks name their modules alike: convolutions `conv1`, `conv2` and so on, the normalization `norm1` beside `conv1`
and so on, and `shortcut`, to whose output the last convolution's branch is added.
"""

import torch
from torch import nn
from torch.nn import functional as F


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the image size, but for its stride."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class PaddedShortcut(nn.Module):
    """The shortcut without parameters: every `stride`-th pixel, and channels of zeros around those that are there.

    This is option A of [He et al. (2015)](https://arxiv.org/abs/1512.03385).

    Args:
        added (`int`): Channels to add, half of them before the others.
        stride (`int`): Stride in both directions.
    """

    def __init__(self, added: int, stride: int):
        super().__init__()
        self.before, self.after, self.stride = added // 2, added - added // 2, stride

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps `(batch, channels, height, width)` to more channels and fewer pixels."""
        kept = hidden_states[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, self.before, self.after))


def make_shortcut(inputs: int, outputs: int, stride: int, padded: bool) -> nn.Module:
    """The shortcut of a block: the identity where sizes stay, else padding or a 1x1 convolution.

    Args:
        inputs (`int`): Channels of the block's input.
        outputs (`int`): Channels of its output.
        stride (`int`): The block's stride.
        padded (`bool`): Whether sizes change by [`PaddedShortcut`].
    """
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return PaddedShortcut(outputs - inputs, stride) if padded else convolution(inputs, outputs, 1, stride)


class BasicBlock(nn.Module):
    """3x3 convolution, norm, ReLU, 3x3 convolution, norm; ReLU of the sum with the shortcut.

    Args:
        inputs (`int`): Channels of its input.
        outputs (`int`): Channels of its output.
        stride (`int`): Stride of the first convolution.
        padded (`bool`): As for [`make_shortcut`].
    """

    pre_activated = False

    def __init__(self, inputs: int, outputs: int, stride: int, padded: bool):
        super().__init__()
        self.conv1, self.norm1 = convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = convolution(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.shortcut = make_shortcut(inputs, outputs, stride, padded)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs the block on `(batch, channels, height, width)`."""
        branch = F.relu(self.norm1(self.conv1(hidden_states)))
        return F.relu(self.norm2(self.conv2(branch)) + self.shortcut(hidden_states))


class PreActivationBlock(nn.Module):
    """The wide block of [Zagoruyko and Komodakis (2016)](https://arxiv.org/abs/1605.07146): norm and ReLU come first.

    Where sizes change, the shortcut reads what the first convolution reads.

    Args:
        inputs, outputs, stride, padded: As for [`BasicBlock`].
    """

    pre_activated = True

    def __init__(self, inputs: int, outputs: int, stride: int, padded: bool):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), convolution(inputs, outputs, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), convolution(outputs, outputs, 3)
        self.shortcut = make_shortcut(inputs, outputs, stride, padded)
        self.same_size = inputs == outputs and stride == 1

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs the block on `(batch, channels, height, width)`."""
        activated = F.relu(self.norm1(hidden_states))
        branch = F.relu(self.norm2(self.conv1(activated)))
        return self.conv2(branch) + self.shortcut(hidden_states if self.same_size else activated)


class PreActivationBottleneck(nn.Module):
    """HAP's bottleneck: 1x1, 3x3 and 1x1 convolution, each behind a norm and ReLU. Only the last one widens.

    Args:
        inputs, outputs, padded: As for [`BasicBlock`].
        stride (`int`): Stride of the 3x3 convolution.
    """

    pre_activated = True

    def __init__(self, inputs: int, outputs: int, stride: int, padded: bool):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), convolution(inputs, inputs, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(inputs), convolution(inputs, inputs, 3, stride)
        self.norm3, self.conv3 = nn.BatchNorm2d(inputs), convolution(inputs, outputs, 1)
        self.shortcut = make_shortcut(inputs, outputs, stride, padded)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs the block on `(batch, channels, height, width)`."""
        branch = self.conv1(F.relu(self.norm1(hidden_states)))
        branch = self.conv2(F.relu(self.norm2(branch)))
        return self.conv3(F.relu(self.norm3(branch))) + self.shortcut(hidden_states)


BLOCKS = {"basic": BasicBlock, "preactivation": PreActivationBlock, "bottleneck": PreActivationBottleneck}
