"""The norm of each component's weights, a baseline that needs no data."""

import torch

from .methods import Method, register_method
from .task import ScoringTask


def magnitude(task: ScoringTask, means: torch.Tensor | None = None) -> torch.Tensor:
    """L2 norm of each component's weights ([Li et al. 2017](https://arxiv.org/abs/1608.08710)).

    Returns:
        `torch.Tensor`: Shape `(num_components,)`.
    """
    return task.squared_norms.sqrt()


register_method("magnitude", Method(sample=None, finish=magnitude, except_kinds=("embedding_dims",)))
