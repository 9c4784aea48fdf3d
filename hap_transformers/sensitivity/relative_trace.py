"""The relative trace: a component's curvature for one weight, times what removing its weights changes."""

import torch

from .task import ScoringTask


def relative_trace(task: ScoringTask, traces: torch.Tensor | None) -> torch.Tensor:
    """Tr(H_cc) / (2 p_c) * ||w_c||^2, Equation 5 of [HAP](https://arxiv.org/abs/2101.08940).

    Args:
        task (`ScoringTask`): What is scored: gives p_c, the number of weights, and ||w_c||^2.
        traces (`torch.Tensor`): Tr(H_cc), shape `(num_components,)`.
    """
    assert traces is not None  # Methods with samples get their mean.
    sizes = [torch.full((group.num_components,), float(group.weights_per_component())) for group in task.groups]
    return traces * task.squared_norms.cpu().double() / (2 * torch.cat(sizes).double())
