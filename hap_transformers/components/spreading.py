"""Projections that hold fewer features of some heads than the attention around them works with.

Attention gives every head as many features as the others. A projection into it that has fewer features of a head gives
zeros in the places of the others. A projection out of it reads only the features that it has. Features that are left
are the first of their head, so that their number says which they are. Where features must stay at their places, as
rotary embeddings require, a string has a mark for every place: "1" if its feature is left, or else "0".

Adapters such as LoRA take a projection's place and call it inside, with the sizes that it has. So the module in the
projection's place spreads and gathers: what holds it hands this on ([`hands_on`]).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .subclasses import cached, dense_class, subclass, take_class


# The features of a head that are left: so many first ones, or those that are marked.
Left = int | str


def spread_outputs(module: nn.Module, left: Sequence[Left], dim: int, factor: float = 1.0) -> None:
    """Lets a projection give zeros in the places of the features that it lacks, and all others times a factor.

    Args:
        module (`nn.Module`): The projection; of a fused one, the heads of all parts count one after the other.
        left (`Sequence[int | str]`): The features that it has of every head.
        dim (`int`): Features that attention works with in every head.
        factor (`float`, *optional*, defaults to 1.0): What makes up for a scale that attention computes from `dim`.
    """
    whole = factor == 1 and set(left) <= {dim}
    _set(module, "spread_outputs", None if whole else (tuple(left), dim, factor), _spreading)


def gather_inputs(module: nn.Module, left: Sequence[Left], dim: int) -> None:
    """Lets a projection read only some features of every head.

    Args:
        module (`nn.Module`): The projection.
        left (`Sequence[int | str]`): The features that it reads of every head.
        dim (`int`): Features that attention gives of every head.
    """
    _set(module, "gathered_inputs", None if set(left) <= {dim} else (tuple(left), dim), _gathering)


def _set(module: nn.Module, name: str, value: tuple | None, subclassed: Callable[[type], type]) -> None:
    """Notes what a projection spreads or gathers, and gives it the class that does so."""
    dense = dense_class(module)
    if value is None:
        vars(module).pop(name, None)
        take_class(module, dense)
    else:
        vars(module)[name] = value
        take_class(module, subclassed(dense))


def read_features(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The features of a module's inputs that it reads."""
    gathered = vars(module).get("gathered_inputs")
    return inputs if gathered is None else features_left(inputs, *gathered)


def given_features(module: nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    """What a module's weights and bias give, of its outputs."""
    if (spread := vars(module).get("spread_outputs")) is None:
        return outputs
    left, dim, factor = spread
    return features_left(outputs, left, dim) / factor


def gradients_of_given(module: nn.Module, gradients: torch.Tensor) -> torch.Tensor:
    """The gradients of [`given_features`], of those of a module's outputs."""
    if (spread := vars(module).get("spread_outputs")) is None:
        return gradients
    left, dim, factor = spread
    return features_left(gradients, left, dim) * factor


def features_left(features: torch.Tensor, left: Sequence[Left], dim: int) -> torch.Tensor:
    """The features of every head that are left.

    Args:
        features (`torch.Tensor`): Shape `(..., heads * dim)`.
        left (`Sequence[int | str]`): Which are left of every head.
        dim (`int`): Features of a head.

    Example:
        >>> features_left(torch.arange(9), [1, 3, "101"], 3).tolist()
        [0, 3, 4, 5, 6, 8]
    """
    if set(left) <= {dim}:
        return features
    if (sizes := _sizes(left)) is None:
        return features.index_select(-1, _places(tuple(left), dim, features.device))
    # Slices are faster than an index.
    return torch.cat([features[..., i * dim : i * dim + size] for i, size in enumerate(sizes)], -1)


def with_zeros(features: torch.Tensor, left: Sequence[Left], dim: int) -> torch.Tensor:
    """Puts zeros in the places of the features that are not left.

    Example:
        >>> with_zeros(torch.tensor([7, 8, 9]), [1, "011"], 3).tolist()
        [7, 0, 0, 0, 8, 9]
    """
    if set(left) <= {dim}:
        return features
    if (sizes := _sizes(left)) is None:
        zeros = features.new_zeros(*features.shape[:-1], len(left) * dim)
        return zeros.index_copy(-1, _places(tuple(left), dim, features.device), features)
    zeros = features.new_zeros(1).expand(*features.shape[:-1], dim)
    runs = features.split(sizes, -1)
    pieces = [piece for run, size in zip(runs, sizes, strict=True) for piece in (run, zeros[..., size:])]
    return torch.cat(pieces, -1)


def _sizes(left: Sequence[Left]) -> list[int] | None:
    """How many first features every head has left; `None` where those of some head are marked."""
    sizes = [each for each in left if isinstance(each, int)]
    return sizes if len(sizes) == len(left) else None


def _places(left: tuple[Left, ...], dim: int, device: torch.device) -> torch.Tensor:
    """The places of the features that are left."""
    if torch.compiler.is_compiling():  # The tensor is a constant of what is compiled or exported.
        return torch.tensor(_numbers(left, dim), dtype=torch.long, device=device)
    return _kept_places(left, dim, device)


@functools.lru_cache(maxsize=1024)  # Two for every layer. To make them takes longer than to use them.
def _kept_places(left: tuple[Left, ...], dim: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # Or gradients could not be computed by them later.
        return torch.tensor(_numbers(left, dim), dtype=torch.long, device=device)


@torch.compiler.assume_constant_result
def _numbers(left: tuple[Left, ...], dim: int) -> list[int]:
    marks = (each if isinstance(each, str) else each * "1" for each in left)
    return [head * dim + i for head, own in enumerate(marks) for i, mark in enumerate(own) if mark == "1"]


def hands_on(holder: nn.Module) -> None:
    """Lets whatever takes the place of a projection, an adapter for example, spread or gather instead of it."""
    if dense_class(holder) is type(holder):
        take_class(holder, _holding(type(holder)))


def set_and_hand_on(self: nn.Module, name: str, value: Any) -> None:
    """`__setattr__` of modules that hold projections."""
    before = vars(self).get("_modules", {}).get(name)
    nn.Module.__setattr__(self, name, value)
    if before is None or before is value or not isinstance(value, nn.Module):
        return
    for attribute, make in (("spread_outputs", spread_outputs), ("gathered_inputs", gather_inputs)):
        if attribute in vars(before):
            arguments = vars(before).pop(attribute)
            take_class(before, dense_class(before))
            make(value, *arguments)


@cached
def _holding(holder_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a module that holds projections."""
    return subclass("Pruned", holder_class, holder_class.forward, _holding, holder_class, __setattr__=set_and_hand_on)


@cached
def _spreading(projection_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a projection that lacks outputs."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        left, dim, factor = self.spread_outputs
        outputs = projection_class.forward(self, hidden_states, *args, **kwargs)
        return with_zeros(outputs if factor == 1 else outputs * factor, left, dim)

    return subclass("Spreading", projection_class, forward, _spreading, projection_class)


@cached
def _gathering(projection_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a projection that reads fewer inputs than it is given."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return projection_class.forward(self, features_left(hidden_states, *self.gathered_inputs), *args, **kwargs)

    return subclass("Gathering", projection_class, forward, _gathering, projection_class)
