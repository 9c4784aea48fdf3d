"""The Gauss-Newton matrix of the masks, with the interactions between heads."""

import torch

from .backward_pass import captured_logits, directions_of_batch
from .batches import ScoredBatch
from .masks import masked_components
from .methods import Finished, Method, register_method
from .statistics import SampleMoments
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
    heads, scale = _heads(task), task.precision.scale
    num_heads = heads.stop - heads.start
    diagonal = torch.zeros(batch.size, sum(task.counts), device=task.device)
    products = torch.zeros(num_heads, num_heads, device=task.device)
    for cotangents in directions.cotangents:
        scaled = [scale * cotangent for cotangent in cotangents]
        jacobian = torch.cat(torch.autograd.grad(outputs, masks, scaled, retain_graph=True), 1) / scale
        diagonal = diagonal + jacobian**2
        products = products + jacobian[:, heads].T @ jacobian[:, heads]
    repeats = max(directions.num_probes, 1)
    return Samples(diagonal / repeats, directions.num_probes, (products / repeats).flatten())


def half(task: ScoringTask, means: torch.Tensor | None) -> torch.Tensor:
    """Halves the diagonal, to the second-order change of the loss."""
    assert means is not None  # Methods with samples get their mean.
    return means / 2


def settle(task: ScoringTask, moments: SampleMoments, progress: bool) -> Finished:
    """Scores and the matrix of interactions between heads, which neurons would be too many for."""
    num_heads = _heads(task).stop - _heads(task).start
    interactions = moments.sums.view(num_heads, num_heads) / moments.num_examples if num_heads else None
    return Finished(half(task, moments.mean), interactions=interactions)


def _heads(task: ScoringTask) -> slice:
    """Where heads lie among all components; an empty slice if none is scored."""
    return task.columns("heads") if any(group.kind.name == "heads" for group in task.groups) else slice(0, 0)


def _num_sums(task: ScoringTask) -> int:
    return (_heads(task).stop - _heads(task).start) ** 2


register_method(
    "fisher",
    Method(fisher, half, settle, _num_sums, comparable=True, in_loss_units=True),
)
