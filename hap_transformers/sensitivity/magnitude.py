"""The norm of each component's weights, a baseline that sees no data."""

import torch

from .task import ScoringTask


def magnitude(task: ScoringTask) -> torch.Tensor:
    """L2 norm of each component's weights ([Li et al. 2017](https://arxiv.org/abs/1608.08710)).

    Returns:
        `torch.Tensor`: Shape `(num_components,)`.
    """
    return task.squared_norms().sqrt()
