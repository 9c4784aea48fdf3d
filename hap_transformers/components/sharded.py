"""Weights of which every process has a part (FSDP)."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def is_sharded(module: nn.Module) -> bool:
    """Whether processes have a part of a module's weights each."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole_values(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values. Of one that is sharded all processes must ask for them."""
    values = parameter.detach()
    return values.full_tensor() if isinstance(values, DTensor) else values
