"""Random scores, the control."""

import torch

from .task import ScoringTask


def random(task: ScoringTask) -> torch.Tensor:
    """Uniform random numbers, by the seed alone.

    Returns:
        `torch.Tensor`: Shape `(num_components,)`.
    """
    return torch.rand(sum(task.counts), generator=torch.Generator().manual_seed(task.seed), dtype=torch.float64)
