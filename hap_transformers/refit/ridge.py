"""Solves ridge regressions from sums of products."""

import torch
from transformers import PreTrainedModel

from ..sensitivity.self_loss import head_of


RIDGE = 0.01
# A few tokens and inputs of theirs dwarf all others, and texts are few: a weaker ridge fits noise.
RIDGE_OF_LANGUAGE_MODELS = 1.0


def ridge_of(model: PreTrainedModel, chosen: float | None) -> float:
    """The strength of a refit's regularization: the one that was chosen, or one that suits the model.

    Raises:
        ValueError: If the chosen one is negative.
    """
    if chosen is None:
        return RIDGE_OF_LANGUAGE_MODELS if head_of(model) == "ForCausalLM" else RIDGE
    if chosen < 0:
        raise ValueError(f"`ridge` must not be negative, got {chosen}.")
    return chosen


def solve_ridge(xx: torch.Tensor, xy: torch.Tensor, ridge: float) -> torch.Tensor:
    """Solves (xx + lambda I) B = xy with lambda = ridge * mean diag(xx); of all solutions the smallest.

    Args:
        xx (`torch.Tensor`): Products of inputs, symmetric and not negative, shape `(inputs, inputs)`.
        xy (`torch.Tensor`): Products of inputs and targets, shape `(inputs, outputs)`.
        ridge (`float`): Strength of the regularization.
    """
    if xx.numel() == 0:
        return xy
    regularized = xx + ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    factor, failed = torch.linalg.cholesky_ex(regularized)
    if failed:  # Features that are constant or depend on others, without a ridge.
        return torch.linalg.pinv(regularized, hermitian=True) @ xy
    return torch.cholesky_solve(xy, factor)
