"""Gradient-based head importance, the baseline."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from ..blocks import AttentionBlock
from .batches import LossFunction, ScoredBatch
from .report import Sensitivity
from .statistics import SampleMoments


def gradient(
    model: PreTrainedModel,
    blocks: list[AttentionBlock],
    batches: Iterable[ScoredBatch],
    loss_fn: LossFunction,
    num_probes: int,
    generator: torch.Generator,
) -> Sensitivity:
    """Scores each head by how strongly the loss reacts to masking it, E_i |dL_i / dm_c| at m = 1.

    The mask m_c multiplies the head's context, before the output projection. Scores are divided by the L2 norm of
    their layer's, as in [Michel et al. 2019](https://arxiv.org/abs/1905.10650). Masks are hooks: Transformers 5 takes
    no `head_mask`.

    Args:
        model (`PreTrainedModel`): The model, in evaluation mode.
        blocks (`list[AttentionBlock]`): Its attention blocks with at least one head.
        batches (`Iterable[ScoredBatch]`): The data.
        loss_fn (`LossFunction`): Mean loss of a batch.
        num_probes (`int`): Not used: nothing is random here.
        generator (`torch.Generator`): Not used.

    Returns:
        `Sensitivity`: With `heads`, one tensor a block.
    """
    moments = SampleMoments(sum(block.num_heads for block in blocks))
    for batch in batches:
        masks = [
            torch.ones(batch.size, b.num_heads, dtype=b.output.weight.dtype, device=b.output.weight.device)
            for b in blocks
        ]
        handles = [
            block.output.register_forward_pre_hook(_mask_heads(mask.requires_grad_()))
            for block, mask in zip(blocks, masks, strict=True)
        ]
        try:
            loss = batch.checked_loss(loss_fn, model)
        finally:
            for handle in handles:
                handle.remove()
        # The loss is a mean over the batch, so an example's own gradient is batch-size times what it adds to it.
        gradients = torch.autograd.grad(loss, masks)
        scores = torch.cat([(batch.size * g).abs().mean(0) for g in gradients])
        moments.add_batch(scores[None], batch.size)
    counts = [block.num_heads for block in blocks]
    layers = moments.mean.split(counts)
    norms = [layer.norm().clamp_min(torch.finfo(torch.float64).tiny) for layer in layers]
    scale = torch.cat([torch.ones(n, dtype=torch.float64) / norm for n, norm in zip(counts, norms, strict=True)])
    return Sensitivity(
        method="gradient",
        heads=[layer / norm for layer, norm in zip(layers, norms, strict=True)],
        num_examples=int(moments.weight),
        reliability=moments.reliability(scale),
    )


def _mask_heads(mask: torch.Tensor):
    """A forward pre-hook that multiplies each example's head contexts by `mask`, shape `(batch, num_heads)`."""

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (context,) = inputs
        heads = context.unflatten(-1, (mask.shape[1], -1))
        return ((heads * mask[:, None, :, None].to(heads.dtype)).flatten(-2),)

    return hook
