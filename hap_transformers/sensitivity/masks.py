"""Masks on components: one number per example and component, which multiplies what the reader reads of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .batches import ScoredBatch
from .task import ScoringTask


@contextmanager
def masked_components(task: ScoringTask, batch: ScoredBatch) -> Iterator[list[torch.Tensor]]:
    """Multiplies heads' contexts and neurons' activations by masks of ones that require gradients.

    Masks are hooks: Transformers 5 takes no `head_mask`.

    Yields:
        `list[torch.Tensor]`: A mask per group, shape `(examples, num_components)`.
    """
    masks, handles = [], []
    for group in task.groups:
        weight = group.readers[0].module.weight
        mask = torch.ones(batch.size, group.num_components, dtype=weight.dtype, device=weight.device)
        masks.append(mask.requires_grad_())
        handles += [reader.module.register_forward_pre_hook(_multiply_by(mask)) for reader in group.readers]
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def _multiply_by(mask: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor]]:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (activations,) = inputs
        components = activations.reshape(len(mask), -1, mask.shape[1], activations.shape[-1] // mask.shape[1])
        return ((components * mask[:, None, :, None].to(components.dtype)).reshape(activations.shape),)

    return hook
