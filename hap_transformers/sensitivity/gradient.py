"""Gradient-based importance, the baseline."""

import torch

from .batches import ScoredBatch
from .masks import masked_components
from .methods import Method, register_method
from .task import Samples, ScoringTask


def gradient(task: ScoringTask, batch: ScoredBatch) -> Samples:
    """How strongly each example's loss reacts to masking each component, |dL_i / dm_c| at m = 1.

    The mask m_c multiplies a head's context, before the output projection, or a neuron's activation
    ([Michel et al. 2019](https://arxiv.org/abs/1905.10650)).
    """
    with masked_components(task, batch) as masks:
        loss = task.loss(batch)
    scale = task.precision.scale
    gradients = torch.cat(torch.autograd.grad(loss * scale, masks), 1)
    # The loss is a mean over the batch, so an example's own gradient is batch-size times what it adds to it.
    return Samples(gradients.abs() * (batch.size / scale))


def normalized_heads(task: ScoringTask, means: torch.Tensor | None) -> torch.Tensor:
    """Divides the means of heads by the L2 norm of their layer's, as Michel et al. do; other kinds are left as is."""
    assert means is not None  # Methods with samples get their mean.
    tiny = torch.finfo(means.dtype).tiny
    return torch.cat(
        [
            layer / layer.norm().clamp_min(tiny) if group.kind.name == "heads" else layer
            for group, layer in zip(task.groups, means.split(task.counts), strict=True)
        ]
    )


register_method("gradient", Method(gradient, normalized_heads))
