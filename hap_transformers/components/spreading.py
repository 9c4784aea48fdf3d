"""Projections that hold fewer features of every head than the attention around them works with.

Attention gives every head as many features as the others. A projection into it that has lost features gives zeros in
their places. A projection out of it reads only the features that it has left. Features that are left are the first of
their head.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .subclasses import cached, dense_class, subclass, take_class


def spread_outputs(module: nn.Module, sizes: Sequence[Sequence[int] | None], dim: int) -> None:
    """Lets a projection give zeros in the places of the features that it lacks.

    Args:
        module (`nn.Module`): The projection.
        sizes (`Sequence[Sequence[int] | None]`): For each part of the projection, the features that it has of every
            head; `None` for a part that lacks none.
        dim (`int`): Features that attention works with in every head.
    """
    vars(module)["spread_outputs"] = ([None if part is None else list(part) for part in sizes], dim)
    take_class(module, _spreading(dense_class(module)))


def gather_inputs(module: nn.Module, sizes: Sequence[int], dim: int) -> None:
    """Lets a projection read only the first features of every head.

    Args:
        module (`nn.Module`): The projection.
        sizes (`Sequence[int]`): The features that it reads of every head.
        dim (`int`): Features that attention gives of every head.
    """
    vars(module)["gathered_inputs"] = (list(sizes), dim)
    take_class(module, _gathering(dense_class(module)))


def runs_of_outputs(module: nn.Module, part: int) -> list[int] | None:
    """The features that a part of a module has of every head, if it lacks any."""
    parts, _ = vars(module).get("spread_outputs", (None, 0))
    return None if parts is None else parts[part]


def read_features(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The features of a module's inputs that it reads."""
    sizes, dim = vars(module).get("gathered_inputs", (None, 0))
    return inputs if sizes is None else first_of_runs(inputs, sizes, dim)


def given_features(module: nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    """The features of a module's outputs, or of their gradients, that it has weights of."""
    parts, dim = vars(module).get("spread_outputs", (None, 0))
    if parts is None:
        return outputs
    cut = [
        part if sizes is None else first_of_runs(part, sizes, dim)
        for part, sizes in zip(outputs.chunk(len(parts), -1), parts, strict=True)
    ]
    return cut[0] if len(cut) == 1 else torch.cat(cut, -1)


def first_of_runs(features: torch.Tensor, sizes: Sequence[int], dim: int) -> torch.Tensor:
    """The first features of every run.

    Args:
        features (`torch.Tensor`): Shape `(..., runs * dim)`.
        sizes (`Sequence[int]`): How many to take of every run.
        dim (`int`): Features of a run.

    Example:
        >>> first_of_runs(torch.arange(6), [1, 2], 3).tolist()
        [0, 3, 4]
    """
    runs = features.unflatten(-1, (len(sizes), dim))
    if len(set(sizes)) == 1:
        return runs[..., : sizes[0]].flatten(-2)
    return torch.cat([runs[..., i, :size] for i, size in enumerate(sizes)], -1)


def zeros_after(features: torch.Tensor, sizes: Sequence[int], dim: int) -> torch.Tensor:
    """Puts zeros in the places that `first_of_runs` leaves out.

    Example:
        >>> zeros_after(torch.tensor([7, 8, 9]), [1, 2], 3).tolist()
        [7, 0, 0, 8, 9, 0]
    """
    if len(set(sizes)) == 1:
        return F.pad(features.unflatten(-1, (len(sizes), sizes[0])), (0, dim - sizes[0])).flatten(-2)
    runs = features.split(list(sizes), -1)
    return torch.cat([F.pad(run, (0, dim - size)) for run, size in zip(runs, sizes, strict=True)], -1)


@cached
def _spreading(projection_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a projection that lacks outputs."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        parts, dim = self.spread_outputs
        given = projection_class.forward(self, hidden_states)
        if len(parts) == 1:
            return zeros_after(given, parts[0], dim)
        pieces = given.split(self.part_sizes, -1)
        whole = [
            piece if sizes is None else zeros_after(piece, sizes, dim)
            for piece, sizes in zip(pieces, parts, strict=True)
        ]
        return torch.cat(whole, -1)

    return subclass("Spreading", projection_class, forward, _spreading, projection_class)


@cached
def _gathering(projection_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a projection that reads fewer inputs than it is given."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        sizes, dim = self.gathered_inputs
        return projection_class.forward(self, first_of_runs(hidden_states, sizes, dim))

    return subclass("Gathering", projection_class, forward, _gathering, projection_class)
