"""Masks: one number per example and component, which multiplies the component's activations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..components.projections import Projection
from .batches import ScoredBatch
from .task import ScoringTask


@contextmanager
def masked_components(task: ScoringTask, batch: ScoredBatch) -> Iterator[list[torch.Tensor]]:
    """Multiplies heads' contexts and neurons' activations by masks while the context is open.

    All masks are 1 and require gradients, so the loss can be differentiated in them. Hooks apply them, because
    Transformers 5 has no argument `head_mask`.

    Args:
        task (`ScoringTask`): The model and the components to mask.
        batch (`ScoredBatch`): The batch that the model will run on.

    Yields:
        `list[torch.Tensor]`: One mask per group of `task.groups`, shape `(examples, num_components)`.
    """
    masks, handles = [], []
    for group in task.groups:
        weight = group.readers[0].module.weight
        mask = torch.ones(batch.size, group.num_components, dtype=weight.dtype, device=weight.device)
        masks.append(mask.requires_grad_())
        handles += [reader.module.register_forward_pre_hook(_multiply_by(mask, reader)) for reader in group.readers]
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def _multiply_by(mask: torch.Tensor, reader: Projection) -> Callable[[nn.Module, tuple[torch.Tensor]], Any]:
    return lambda module, inputs: (reader.times(inputs[0], mask),)
