"""Computes the Gauss-Newton matrix's trace for all components with one backward pass per output direction."""

from collections import defaultdict

import torch
from torch import nn

from ..components.groups import Group
from ..components.projections import Projection
from .backward_pass import BackwardPass, SharedByExamplesError
from .batches import ScoredBatch, counts, shifts_labels
from .ghost_norms import gram_matrix, prefers_ghost, squared_gradient_norms
from .layer_removal import BY_REMOVAL
from .methods import Method, register_method
from .relative_trace import relative_trace
from .task import Samples, ScoringTask


def gauss_newton_trace(task: ScoringTask, batch: ScoredBatch) -> Samples:
    r"""Computes every example's Gauss-Newton trace of every component.

    Let z_i be the outputs of example i, and s_k the columns of a square root of the loss's Hessian in z. Then

        Tr(G_cc) = mean_i sum_k || d(s_k . z_i) / dw_c ||^2.

    So one backward pass per direction gives all components without probe noise. The norms are computed from the
    projections' inputs and output gradients ([`squared_gradient_norms`]). Weights stay frozen, and no gradient of a
    weight is formed.

    For losses like cross-entropy G is the Fisher information. It equals the Hessian where the model fits its data
    (Martens, "New insights and perspectives on the natural gradient method",
    [arXiv 1412.1193](https://arxiv.org/abs/1412.1193)).

    If examples have many outputs, random mixtures replace the directions (see [`output_directions`]). The estimate is
    then unbiased instead of exact.

    Some modules have an input that all examples share: DeBERTa applies the query and key projections to its relative
    positions. Gradients of single examples cannot be separated there, so such a model runs example by example.

    Returns:
        `Samples`: One sample per example.

    Raises:
        ValueError: If the loss's Hessian in the logits cannot be factored.
    """
    try:
        return _traces(task, batch)
    except SharedByExamplesError:
        shifted = shifts_labels(task.model)
        parts = [_traces(task, part) if counts(part.inputs, shifted) else None for part in batch.split(1)]
        known = [part for part in parts if part is not None]
        rows = [torch.zeros_like(known[0].values) if part is None else part.values for part in parts]
        # The batch's loss is the mean over the examples with labels.
        return Samples(torch.cat(rows) * (batch.size / len(known)), known[0].num_probes)


def _traces(task: ScoringTask, batch: ScoredBatch) -> Samples:
    backward = _TracePass(task, batch)
    directions = backward.run()
    repeats = max(directions.num_probes, 1)
    return Samples(backward.values / (repeats * task.precision.scale**2), directions.num_probes)


class _TracePass(BackwardPass):
    """Adds up the components' squared gradient norms in `values`, shape `(examples, num_components)`."""

    def __init__(self, task: ScoringTask, batch: ScoredBatch):
        dtype = torch.promote_types(task.model.dtype, torch.float32)
        self.values = torch.zeros(batch.size, sum(task.counts), dtype=dtype, device=task.device)
        self.grams: dict[tuple, torch.Tensor] = {}
        self.owners: dict[nn.Module, list[tuple[Group, Projection, torch.Tensor]]] = defaultdict(list)
        for group, columns in zip(task.groups, self.values.split(task.counts, dim=1), strict=True):
            for projection in (*group.writers, *group.readers):
                self.owners[projection.module].append((group, projection, columns))
        super().__init__(task, batch, [projection for owned in self.owners.values() for _, projection, _ in owned])

    def receive(self, module: nn.Module, tokens: torch.Tensor, cotangents: torch.Tensor) -> None:
        for group, projection, columns in self.owners[module]:
            if projection in group.readers:
                norms = squared_gradient_norms(tokens, cotangents)
            else:
                part = projection.outputs_of(cotangents)
                norms = squared_gradient_norms(part, tokens, self._gram(module, tokens, part), projection.has_bias)
            columns += norms.unflatten(1, (group.num_components, -1)).sum(2)

    def _gram(self, module: nn.Module, tokens: torch.Tensor, owned: torch.Tensor) -> torch.Tensor | None:
        """Returns the tokens' Gram matrix, or `None` if it is not needed.

        Query, key and value, and all directions, share one Gram matrix.
        """
        if owned.dtype == torch.float16 or not prefers_ghost(owned, tokens):
            return None
        inputs = self.inputs[module]
        key = (*(tensor.data_ptr() for tensor in inputs), inputs[0].shape)
        if key not in self.grams:
            self.grams[key] = gram_matrix(tokens)
        return self.grams[key]


register_method(
    "gauss_newton_trace",
    Method(
        gauss_newton_trace,
        relative_trace,
        curvature="logits",
        comparable=True,
        in_loss_units=True,
        has_traces=True,
        except_kinds=("embedding_dims",),
        of_wholes=BY_REMOVAL,
    ),
)
