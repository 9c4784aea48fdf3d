"""Convolutions of which some filters read a single pixel: what implants put in the place of larger filters."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .convolutions import Convolution, nothing_of
from .groups import Group
from .projections import DTYPES
from .subclasses import cached, dense_class, subclass, take_class


@dataclass(frozen=True)
class ImplantedConvolution(Convolution):
    """A convolution whose last filters are 1x1. Its matrix has zeros where these do not read."""

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The weights of both sizes, and the bias if there is one."""
        return [*super().parameters, self.module.implant]

    @property
    def is_plain(self) -> bool:
        """Whether the parameters are of ordinary floating point."""
        parameters = list(self.module.parameters(recurse=False))
        return all(type(p) is nn.Parameter and p.dtype in DTYPES for p in parameters)

    @property
    def can_be_cut(self) -> bool:
        """No: filters of two sizes do not shrink together."""
        return False

    @property
    def part_sizes(self) -> list[int]:
        """All filters are one part."""
        return [self.module.out_channels]

    @property
    def as_matrix(self) -> torch.Tensor:
        """Shape `(outputs, input channels * kernel area)`."""
        large, small = self.module_matrix(self.module.weight), self.module.implant
        padded = large.new_zeros(len(small), large.shape[1])
        padded[:, self._centres()] = small.flatten(1)
        return torch.cat([large, padded])

    @property
    def narrow(self) -> tuple[slice, slice]:
        """The outputs of the 1x1 filters, and the inputs that these read."""
        return slice(len(self.module.weight), None), self._centres()

    def write(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Puts numbers into the weights, and into the bias if there is one."""
        rows, columns = self.narrow
        with torch.no_grad():
            self.module.weight.copy_(matrix[: rows.start].reshape(self.module.weight.shape))
            self.module.implant.copy_(matrix[rows, columns].reshape(self.module.implant.shape))
            if bias is not None:
                self.module.bias.copy_(bias)

    def weights_by_rows(self) -> int:
        """Number of weights and biases behind the outputs."""
        return sum(parameter.numel() for parameter in self.parameters)

    def _centres(self) -> slice:
        """The inputs of the kernel's centre, one of each channel."""
        height, width = self.module.kernel_size
        return slice(height * width // 2, None, height * width)


def view_of(name: str, module: nn.Module) -> Convolution:
    """The view of a convolution, which may have 1x1 filters in the place of others."""
    return (ImplantedConvolution if "implant_rank" in vars(module) else Convolution)(name, module)


def area_beyond_centre(module: Any) -> int:
    """Places of a kernel beside its centre; 0 where no 1x1 filter can take the place of the convolution's own.

    The kernel must have a centre, which reads the pixel that a 1x1 filter of the same stride reads.
    """
    sizes = zip(module.kernel_size, module.dilation, module._reversed_padding_repeated_twice[::-2], strict=True)
    centred = (size % 2 and padding == dilation * (size // 2) for size, dilation, padding in sizes)
    if module.groups > 1 or not all(centred):
        return 0
    return module.kernel_size[0] * module.kernel_size[1] - 1


def set_pointwise(group: Group, rank: int) -> None:
    """Makes the filters of a group's last `rank` channels 1x1; they start as the centres of those that were there."""
    module = group.writers[0].module
    height, width = module.kernel_size
    large, small = module.weight.detach().split([len(module.weight) - rank, rank])
    required = module.weight.requires_grad
    module.implant = nn.Parameter(small[:, :, height // 2, width // 2][:, :, None, None].clone(), required)
    module.weight = nn.Parameter(large.clone(), required and large.numel() > 0)
    vars(module)["implant_rank"] = rank
    take_class(module, _implanted(dense_class(module)))


@cached
def _implanted(convolution_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a convolution so that its last `implant_rank` filters read a single pixel."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if "implant" not in self._parameters:  # Adapters make layers of their own of the class.
            return convolution_class.forward(self, hidden_states)
        if not self.in_channels:
            nothing = nothing_of(self, hidden_states).expand(-1, self.out_channels, -1, -1)
            return nothing if self.bias is None else nothing + self.bias[:, None, None]
        bias, large_bias = self.bias, None
        if bias is not None:
            large_bias, bias = bias.split([len(self.weight), self.implant_rank])
        small = F.conv2d(hidden_states, self.implant, bias, self.stride)
        if not len(self.weight):
            return small
        return torch.cat([self._conv_forward(hidden_states, self.weight, large_bias), small], 1)

    return subclass("Implanted", convolution_class, forward, _implanted, convolution_class)
