"""Computes the Gauss-Newton matrix in the masks: its diagonal, and the interactions between heads."""

import torch

from .backward_pass import captured_logits, captured_outputs, directions_of_batch
from .batches import ScoredBatch
from .masks import masked_components
from .methods import Finished, Method, register_method
from .statistics import SampleMoments
from .task import Samples, ScoringTask


def fisher(task: ScoringTask, batch: ScoredBatch) -> Samples:
    r"""Computes each example's diagonal of the masks' Gauss-Newton matrix, and the batch's matrix over heads.

    With masks m as in `gradient` and output directions s_k as in `gauss_newton_trace`,

        F_cd = mean_i sum_k d(s_k . z_i)/dm_c  d(s_k . z_i)/dm_d.

    If the gradient vanishes, removing a set of components changes the loss by about half the sum of F over all pairs
    of the set (Kwon et al., [arXiv 2204.09656](https://arxiv.org/abs/2204.09656)).

    Returns:
        `Samples`: One sample per example, and the sum of the matrix over heads.

    Raises:
        ValueError: If the loss's Hessian in the logits cannot be factored.
    """
    with masked_components(task, batch) as masks, captured_outputs(task) as captured:
        loss = task.loss(batch)
    outputs = captured_logits(task, captured, loss)
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
    return Samples(diagonal / repeats, directions.num_probes, [products / repeats])


def half(task: ScoringTask, means: torch.Tensor | None) -> torch.Tensor:
    """Halves the diagonal: the result is the second-order change of the loss."""
    assert means is not None  # Methods with samples receive their mean.
    return means / 2


def settle(task: ScoringTask, moments: SampleMoments, progress: bool) -> Finished:
    """Returns scores and the matrix of interactions between heads. Neurons are too many for such a matrix."""
    num_heads = _heads(task).stop - _heads(task).start
    interactions = moments.sums.view(num_heads, num_heads) / moments.num_examples if num_heads else None
    return Finished(half(task, moments.mean.cpu()), interactions=None if interactions is None else interactions.cpu())


def _heads(task: ScoringTask) -> slice:
    """Returns the positions of the heads among all components; an empty slice if no heads are scored."""
    return task.columns("heads") if any(group.kind.name == "heads" for group in task.groups) else slice(0, 0)


def _num_sums(task: ScoringTask) -> int:
    return (_heads(task).stop - _heads(task).start) ** 2


register_method(
    "fisher",
    Method(
        fisher,
        half,
        settle,
        _num_sums,
        curvature="logits",
        except_kinds=("embedding_dims", "query_key_dims"),
        comparable=True,
        in_loss_units=True,
    ),
)
