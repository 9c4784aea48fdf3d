"""Random scores, the control."""

import torch

from .methods import Method, register_method
from .task import ScoringTask


def random(task: ScoringTask, means: torch.Tensor | None = None) -> torch.Tensor:
    """Uniform random numbers, which depend on the seed alone.

    Returns:
        `torch.Tensor`: Shape `(num_components,)`.
    """
    return torch.rand(sum(task.counts), generator=torch.Generator().manual_seed(task.seed), dtype=torch.float64)


register_method("random", Method(sample=None, finish=random))
