"""Convolutions and the norms behind them as projections, whose tokens are an image's positions."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .projections import DTYPES, STORED_AS, Projection
from .subclasses import cached, dense_class, subclass, take_class


# Positions of an image that a second moment is summed over. Neighbours see nearly the same.
POSITIONS = 64


@dataclass(frozen=True)
class Convolution(Projection):
    """A `nn.Conv2d`: its matrix has an input for each channel and place of the kernel, channel by channel."""

    def module_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Shape `(outputs, input channels * kernel area)`, of a tensor shaped like the module's weight."""
        return weight.flatten(1)

    def read(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the matrix reads at up to `POSITIONS` positions of every image, shape `(images, positions, inputs)`."""
        examples, length = len(inputs), prod(output_size(self.module, inputs))
        if length <= POSITIONS or not inputs.shape[1] or self.module.dilation != (1, 1):
            return _some_of(self.tokens(inputs, examples))
        (height, width), (rows, columns) = self.module.kernel_size, self.module.stride
        patches = self._padded(inputs).unfold(2, height, rows).unfold(3, width, columns)
        some = _some(examples, length, inputs.device)
        image = torch.arange(examples, device=inputs.device)[:, None]
        return patches[image, :, some // patches.shape[3], some % patches.shape[3]].flatten(2)

    def seen(self, outputs: torch.Tensor) -> torch.Tensor:
        """Features at the positions that `read` reads at, shape `(images, positions, outputs)`.

        Args:
            outputs (`torch.Tensor`): A map of the size that the module gives, shape `(images, outputs, height,
                width)`.
        """
        return _some_of(outputs.flatten(2).mT).clone()  # Models may add to an output in place.

    def tokens(self, inputs: torch.Tensor, examples: int) -> torch.Tensor:
        """What the matrix reads at all positions, shape `(examples, positions, inputs)`."""
        module = self.module
        if not inputs.shape[1]:
            return inputs.new_zeros(examples, prod(output_size(module, inputs)), 0)
        if module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0):
            return inputs.flatten(2).mT
        columns = F.unfold(self._padded(inputs), module.kernel_size, module.dilation, stride=module.stride)
        return columns.mT

    def cotangents(self, gradients: torch.Tensor, examples: int) -> torch.Tensor:
        """Gradients of the module's outputs, shape `(examples, positions, outputs)`."""
        return gradients.flatten(2).mT

    def applied(self, inputs: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the module gives with another matrix, shape `(outputs, inputs)`, and bias."""
        if not matrix.numel():  # No kernel has a case for that.
            given = nothing_of(self.module, inputs).expand(-1, len(matrix), -1, -1)
            return given if bias is None else given + bias[:, None, None]
        return self.module._conv_forward(inputs, matrix.view(self.module.weight.shape), bias)

    def times(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The module's inputs, with every example's components multiplied by its row of a mask."""
        run = inputs.shape[1] // mask.shape[1]
        return inputs * mask.repeat_interleave(run, 1)[:, :, None, None].to(inputs.dtype)

    def stored_shape(self, outputs: int, inputs: int) -> list[int]:
        """Shape of the weight of a module with so many outputs and inputs."""
        return [outputs, inputs // prod(self.module.kernel_size), *self.module.kernel_size]

    def keep(self, index: torch.Tensor, *, outputs: bool) -> None:
        """Keeps some outputs, or whole input channels, of the module, whose parameters are replaced."""
        area = prod(self.module.kernel_size)
        super().keep(index if outputs else index[::area] // area, outputs=outputs)

    def empty(self, *, outputs: bool) -> None:
        """Lets the module, which has no outputs, or no inputs, left, compute no product."""
        take_class(self.module, (_without_outputs if outputs else _without_inputs)(dense_class(self.module)))

    def write(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Puts numbers into the weight, and into the bias if there is one."""
        with torch.no_grad():
            self.module.weight.copy_(matrix.reshape(self.module.weight.shape))
            if bias is not None:
                self.module.bias.copy_(bias)

    def _padded(self, inputs: torch.Tensor) -> torch.Tensor:
        module = self.module
        sides = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(inputs, sides, mode=mode) if any(sides) else inputs

    def _note_sizes(self) -> None:
        self.module.out_channels, self.module.in_channels = self.module.weight.shape[:2]


@dataclass(frozen=True)
class ChannelNorms(Convolution):
    """A view of a convolution that has one number for each input channel and position: the norm of all it reads."""

    def tokens(self, inputs: torch.Tensor, examples: int) -> torch.Tensor:
        """Shape `(examples, positions, input channels)`."""
        module, squares = self.module, self._padded(inputs).square()
        if module.dilation != (1, 1):  # A pooling would sum what lies between, too.
            read = super().tokens(inputs, examples).unflatten(2, (inputs.shape[1], -1))
            return torch.linalg.vector_norm(read, dim=3)
        if module.kernel_size != (1, 1) or module.stride != (1, 1):
            # A pooling sums the places of a kernel much faster than a convolution of each channel.
            squares = F.avg_pool2d(squares, module.kernel_size, module.stride, divisor_override=1)
        return squares.flatten(2).mT.sqrt()


@dataclass(frozen=True)
class GroupedConvolution(Convolution):
    """A convolution that follows: every run of its channels is computed from the same run before it."""

    def keep(self, index: torch.Tensor, *, outputs: bool) -> None:
        """Keeps some runs."""
        run = self.module.out_channels // self.module.groups
        super().keep(index, outputs=outputs)
        self.module.groups = len(index) // run

    def _note_sizes(self) -> None:
        self.module.out_channels = self.module.in_channels = self.module.weight.shape[0]


@dataclass(frozen=True)
class Squeezed(Convolution):
    """A convolution of the means of channels that follow: what goes with a channel are its inputs."""

    @property
    def has_bias(self) -> bool:
        """No: its biases belong to no channel."""
        return False

    def module_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Shape `(channels, outputs of the convolution)`, of a tensor shaped like the module's weight."""
        return weight.flatten(1).T

    def stored_shape(self, outputs: int, inputs: int) -> list[int]:
        """Shape of the weight of a module that reads so many channels."""
        return [inputs, outputs, 1, 1]

    def keep(self, index: torch.Tensor, *, outputs: bool) -> None:
        """Keeps some channels."""
        super().keep(index, outputs=False)

    def empty(self, *, outputs: bool) -> None:
        """Lets the module, which has no channels left, give its bias."""
        super().empty(outputs=False)


@dataclass(frozen=True)
class RunningNorm(Projection):
    """A BatchNorm, whose running statistics go with its channels."""

    @property
    def is_plain(self) -> bool:
        """Whether it has weights and statistics of ordinary floating point."""
        parameters = [*self.module.parameters(), self.module.running_mean, self.module.running_var]
        known = isinstance(self.module, nn.BatchNorm2d) and len(parameters) == 4
        return known and all(tensor is not None and tensor.dtype in DTYPES for tensor in parameters)

    def module_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Shape `(channels, 1)`, of a tensor shaped like the module's weight."""
        return weight[:, None]

    def stored_shape(self, outputs: int, inputs: int) -> list[int]:
        """Shape of the weight of a module with so many outputs."""
        return [outputs]

    def keep(self, index: torch.Tensor, *, outputs: bool) -> None:
        """Keeps some channels."""
        super().keep(index, outputs=outputs)
        for name in ("running_mean", "running_var"):
            statistics = getattr(self.module, name)
            setattr(self.module, name, statistics.index_select(0, index.to(statistics.device)))

    def empty(self, *, outputs: bool) -> None:
        """Lets the norm, which has no channels left, return what it is given."""
        take_class(self.module, _passing(dense_class(self.module)))

    def set_statistics(
        self, mean: torch.Tensor, variance: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor
    ) -> None:
        """Sets running statistics, and the weight and bias with which the norm is an affine map in evaluation mode.

        Args:
            mean (`torch.Tensor`): Of what the norm reads, shape `(channels,)`.
            variance (`torch.Tensor`): Of the same.
            scale (`torch.Tensor`): What it shall multiply by.
            centre (`torch.Tensor`): What it shall give for the mean.
        """
        with torch.no_grad():
            self.module.running_mean.copy_(mean)
            self.module.running_var.copy_(variance)
            self.module.weight.copy_(scale * (variance + self.module.eps).sqrt())
            self.module.bias.copy_(centre)

    @property
    def values(self) -> list[torch.Tensor]:
        """Weight, bias and running statistics."""
        return [*self.parameters, self.module.running_mean, self.module.running_var]

    def scale(self) -> torch.Tensor:
        """What it multiplies every channel by in evaluation mode."""
        return self.module.weight * (self.module.running_var + self.module.eps).rsqrt()

    def _note_sizes(self) -> None:
        self.module.num_features = len(self.module.weight)


@lru_cache(maxsize=64)
def _some(examples: int, length: int, device: torch.device) -> torch.Tensor:
    """Positions that differ from image to image, the same in every call, shape `(examples, POSITIONS)`."""
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(examples, length, generator=generator).argsort(1)[:, :POSITIONS]
    return places.sort(1).values.to(device)


def _some_of(tokens: torch.Tensor) -> torch.Tensor:
    """Up to `POSITIONS` of the positions of every image, shape `(images, positions, features)`."""
    if tokens.shape[1] <= POSITIONS:
        return tokens
    some = _some(*tokens.shape[:2], tokens.device)
    return tokens.gather(1, some[..., None].expand(-1, -1, tokens.shape[2]))


def output_size(module: Any, inputs: torch.Tensor) -> tuple[int, int]:
    """Height and width of what a convolution gives."""
    # The last dimension's padding is first.
    left, right, top, bottom = module._reversed_padding_repeated_twice
    sizes = (inputs.shape[2] + top + bottom, inputs.shape[3] + left + right)
    rows, columns = (
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            sizes, module.kernel_size, module.stride, module.dilation, strict=True
        )
    )
    return rows, columns


def nothing_of(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Zeros of the height and width that a convolution gives, of one channel."""
    # The sum of nothing keeps what comes before in the graph, as DistributedDataParallel requires.
    return inputs[:, :0].sum((1, 2, 3), keepdim=True).expand(-1, 1, *output_size(module, inputs))


@cached
def _without_outputs(convolution_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a convolution without filters."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nothing_of(self, hidden_states)[:, :0]

    return subclass("Empty", convolution_class, forward, _without_outputs, convolution_class)


@cached
def _without_inputs(convolution_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a convolution that reads nothing, of which the bias is left."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = self.weight.new_zeros(self.out_channels) if self.bias is None else self.bias
        return nothing_of(self, hidden_states) + bias[:, None, None]

    return subclass("Empty", convolution_class, forward, _without_inputs, convolution_class)


@cached
def _passing(norm_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a norm without channels."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    return subclass("Empty", norm_class, forward, _passing, norm_class)


STORED_AS[nn.Conv2d] = Convolution
