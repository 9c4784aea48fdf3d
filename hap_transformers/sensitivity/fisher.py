"""The Gauss-Newton matrix of the masks, with the interactions between heads."""

import torch

from ..components.groups import AttentionBlock
from .backward_pass import captured_logits, directions_of_batch
from .batches import ScoredBatch
from .masks import masked_components
from .task import Samples, ScoringTask


def fisher(task: ScoringTask, batch: ScoredBatch) -> Samples:
    r"""Every example's diagonal of the mask-space Gauss-Newton matrix, and the batch's matrix over heads.

    With masks m as for `gradient` and output directions s_k as for `gauss_newton_trace`,

        F_cd = mean_i sum_k d(s_k . z_i)/dm_c  d(s_k . z_i)/dm_d,

    so that removing a set of components changes the loss by about half the sum of F over all pairs of the set, where
    the gradient vanishes (Kwon et al., [arXiv 2204.09656](https://arxiv.org/abs/2204.09656)).
    """
    with masked_components(task, batch) as masks, captured_logits(task) as outputs:
        loss = task.loss(batch)
    directions = directions_of_batch(task, batch, loss, outputs)
    num_heads = sum(block.num_components for block in task.blocks if isinstance(block, AttentionBlock))
    scale = task.precision.scale
    diagonal = torch.zeros(batch.size, sum(task.counts), device=task.device)
    products = torch.zeros(num_heads, num_heads, device=task.device)
    for cotangents in directions.cotangents:
        scaled = [scale * cotangent for cotangent in cotangents]
        jacobian = torch.cat(torch.autograd.grad(outputs, masks, scaled, retain_graph=True), 1) / scale
        diagonal = diagonal + jacobian**2
        heads = jacobian[:, :num_heads]
        products = products + heads.T @ heads
    repeats = max(directions.num_probes, 1)
    return Samples(diagonal / repeats, directions.num_probes, (products / repeats).flatten())
