"""A linear map inside a model, seen as a matrix of shape (outputs, inputs) however the module stores it."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Projection:
    """A Linear or Conv1D, or one of the equal parts of a fused one (queries, keys and values; neurons and gates).

    Args:
        name (`str`): Path of the module from `model.base_model`.
        module (`nn.Linear` or `Conv1D`): The module that owns the weights.
        part (`int`, *optional*, defaults to 0): Which of the equal parts of the module's outputs this is.
        parts (`int`, *optional*, defaults to 1): How many parts there are.
    """

    name: str
    module: nn.Linear | Conv1D
    part: int = 0
    parts: int = 1

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The module's weight, and its bias if it has one."""
        return [p for p in (self.module.weight, self.module.bias) if p is not None]

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self.module.weight.shape[1 if isinstance(self.module, Conv1D) else 0] // self.parts

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self.module.weight.shape[0 if isinstance(self.module, Conv1D) else 1]

    def outputs_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This projection's part of a tensor whose last dimension is the module's outputs."""
        return tensor.narrow(-1, self.part * self.out_features, self.out_features)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """This projection's part, shape `(outputs, inputs)`, of a tensor shaped like the module's weight."""
        stored = weight if isinstance(self.module, Conv1D) else weight.T
        return self.outputs_of(stored).T


def find_projections(root: nn.Module, path: str, names: tuple[str, ...], optional: bool = False) -> list[Projection]:
    """The projections of a layer; a name given n times is a fused one in n parts.

    Args:
        root (`nn.Module`): The base model.
        path (`str`): Path of the layer from there, with a final dot.
        names (`tuple[str, ...]`): Paths from the layer.
        optional (`bool`, *optional*, defaults to `False`): Whether to pass over modules that the layer does not have.

    Raises:
        ValueError: If the layer lacks a module.
    """
    modules = dict(root.get_submodule(path[:-1]).named_modules())
    missing = [name for name in names if name not in modules]
    if missing and not optional:
        raise ValueError(
            f"'{path[:-1]}' of {type(root).__name__} has no module {missing[0]!r}; its entry in "
            "hap_transformers.ARCHITECTURES does not fit this model."
        )
    return [
        Projection(path + name, modules[name], names[:i].count(name), names.count(name))
        for i, name in enumerate(names)
        if name in modules
    ]
