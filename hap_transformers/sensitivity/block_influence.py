"""How much layers change what they read, after ShortGPT."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..tokens import mask_of
from .batches import ScoredBatch
from .layer_removal import as_they_are
from .methods import Method
from .task import Samples, ScoringTask


def block_influence(task: ScoringTask, batch: ScoredBatch) -> Samples:
    """Computes one minus the cosine of what a layer reads and what it gives, the mean over each example's tokens.

    See Men et al., [arXiv 2403.03853](https://arxiv.org/abs/2403.03853). It takes one forward pass. A layer that runs
    several times counts with the mean.

    Returns:
        `Samples`: One sample per example.

    Raises:
        ValueError: If the loss cannot be computed, is not finite, or does not run all layers.
    """
    found: dict[nn.Module, list[torch.Tensor]] = {}
    masks = {group.around: mask_of(batch.inputs, group.decoded) for group in task.groups}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        read = args[0] if args else kwargs["hidden_states"]
        given = output[0] if isinstance(output, tuple) else output
        changes = (1 - F.cosine_similarity(read.float(), given.float(), dim=-1)).reshape(batch.size, -1)
        counts, mask = torch.ones_like(changes), masks[module]
        if isinstance(mask, torch.Tensor) and mask.numel() == counts.numel():
            counts = mask.reshape(counts.shape).to(counts)
        found.setdefault(module, []).append((changes * counts).sum(1) / counts.sum(1).clamp_min(1))

    layers = [group.around for group in task.groups]
    handles = [layer.register_forward_hook(see, with_kwargs=True) for layer in layers if layer is not None]
    try:
        with torch.no_grad():
            task.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [group.layer for group in task.groups if group.around not in found]:
        raise ValueError(
            f"Layers {missing} of {type(task.model).__name__} do not run where {task.loss_name} is computed, so what "
            "they change is not known. Give a loss_fn that runs the whole model on the batch."
        )
    return Samples(torch.stack([torch.stack(found[layer]).mean(0) for layer in layers if layer is not None], 1))


BLOCK_INFLUENCE = Method(block_influence, as_they_are, comparable=True, foresees_refit=True)
