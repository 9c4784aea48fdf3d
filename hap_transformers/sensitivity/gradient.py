"""Gradient-based importance, the baseline."""

import torch

from .batches import ScoredBatch
from .masks import masked_components
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
