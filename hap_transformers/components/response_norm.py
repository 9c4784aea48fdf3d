"""The global response normalization of ConvNeXt V2 as a follower."""

from dataclasses import dataclass

import torch
from torch import nn

from .projections import DTYPES, Projection
from .subclasses import cached, dense_class, subclass, take_class


@dataclass(frozen=True)
class ResponseNorm(Projection):
    """A module that scales every channel by its norm over the mean of all channels' norms.

    Channels that are gone have the norm 0 in this mean, as masked ones have.
    """

    @property
    def is_plain(self) -> bool:
        """Whether it has a weight and a bias of ordinary floating point."""
        parameters = dict(self.module.named_parameters())
        return parameters.keys() == {"weight", "bias"} and all(p.dtype in DTYPES for p in parameters.values())

    def module_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Shape `(channels, 1)`, of a tensor shaped like the module's weight."""
        return weight.reshape(-1, 1)

    def stored_shape(self, outputs: int, inputs: int) -> list[int]:
        """Shape of the weight of a module with so many channels."""
        return [1, 1, 1, outputs]

    def keep(self, index: torch.Tensor, *, outputs: bool) -> None:
        """Keeps some channels."""
        module = self.module
        vars(module).setdefault("dense_channels", module.weight.shape[-1])
        for name, parameter in list(module.named_parameters()):
            kept = parameter.detach()[..., index.to(parameter.device)]
            module.register_parameter(name, nn.Parameter(kept, parameter.requires_grad))
        take_class(module, _fewer(dense_class(module)))

    def empty(self, *, outputs: bool) -> None:
        """Does nothing: without channels there is nothing to compute."""


@cached
def _fewer(norm_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a response normalization that has fewer channels than the mean is over."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norms = torch.linalg.vector_norm(hidden_states, dim=(1, 2), keepdim=True)
        relative = norms / (norms.sum(-1, keepdim=True) / self.dense_channels + 1e-6)
        return self.weight * (hidden_states * relative) + self.bias + hidden_states

    return subclass("Fewer", norm_class, forward, _fewer, norm_class)
