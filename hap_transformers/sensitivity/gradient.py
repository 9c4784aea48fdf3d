"""Gradient-based importance, a baseline."""

import torch

from .batches import ScoredBatch
from .masks import masked_components
from .methods import Method, register_method
from .outputs import noted_outputs
from .task import Samples, ScoringTask


def gradient(task: ScoringTask, batch: ScoredBatch) -> Samples:
    """Computes the absolute derivative of each example's loss in each component's mask, |dL_i / dm_c| at m = 1.

    The mask m_c multiplies a head's context before the output projection, or a neuron's activation
    ([Michel et al. 2019](https://arxiv.org/abs/1905.10650)).

    Returns:
        `Samples`: One sample per example.

    Raises:
        ValueError: If the batch has no labels.
    """
    with masked_components(task, batch) as masks:
        loss = task.loss(batch)
    if noted_outputs(loss) is not None:
        raise ValueError(
            f"Batch {batch.number} has no labels (its entries: {sorted(batch.inputs)}). 'gradient' needs them: the "
            "loss of a model against itself has no gradient. Give batches with labels, or use method='kronecker'."
        )
    scale = task.precision.scale
    gradients = torch.cat(torch.autograd.grad(loss * scale, masks), 1)
    # The loss is a mean over the batch: the gradient of one example's loss is the batch size times its contribution.
    return Samples(gradients.abs() * (batch.size / scale))


def normalized_heads(task: ScoringTask, means: torch.Tensor | None) -> torch.Tensor:
    """Divides the means of heads by their L2 norm per layer, as Michel et al. do; other kinds stay unchanged."""
    assert means is not None  # Methods with samples receive their mean.
    tiny = torch.finfo(means.dtype).tiny
    return torch.cat(
        [
            layer / layer.norm().clamp_min(tiny) if group.kind.name == "heads" else layer
            for group, layer in zip(task.groups, means.split(task.counts), strict=True)
        ]
    )


register_method("gradient", Method(gradient, normalized_heads, except_kinds=("embedding_dims", "query_key_dims")))
