"""Estimates the output projections' Kronecker-factored curvature, and from it the cost of removals after a refit."""

from collections.abc import Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from ..components.groups import Group
from ..components.sharded import whole_values
from ..tokens import products, valid_tokens
from .backward_pass import BackwardPass, SharedByExamplesError
from .batches import ScoredBatch, counts
from .ghost_norms import squared_gradient_norms
from .methods import Finished, Method, register_method
from .relative_trace import relative_trace
from .statistics import SampleMoments
from .surgeon import removal_costs
from .task import Samples, ScoringTask


def kronecker(task: ScoringTask, batch: ScoredBatch) -> Samples:
    r"""Sums both Kronecker factors of every output projection's curvature over a batch.

    Let an output projection have inputs x_it (valid token t of example i), and cotangents g_ikt of the output
    direction s_k . z_i (see `gauss_newton_trace`). Its Gauss-Newton matrix is approximately C (x) A with

        A = mean_it (x_it - mean x)(x_it - mean x)^T,    C = mean_i sum_kt g_ikt g_ikt^T

    (Martens and Grosse, [arXiv 1503.05671](https://arxiv.org/abs/1503.05671); for weights that several tokens share,
    "expand" in Eschenhagen et al., [arXiv 2311.00636](https://arxiv.org/abs/2311.00636)). Inputs are centred if the
    projection has a bias, because the bias's refit compensates for their means. [`surgeon_costs`] turns the factors
    into costs of removal.

    The values of single examples are the Gauss-Newton traces of the output projections' columns. They are proxy
    scores, used only to estimate the reliability. The final scores are the costs.

    Returns:
        `Samples`: One sample per example, and the sums of the factors.

    Raises:
        ValueError: If the loss's Hessian in the logits cannot be factored.
    """
    try:
        return _sums(task, batch)
    except SharedByExamplesError:
        parts = [_sums(task, part) if counts(part.inputs) else None for part in batch.split(1)]
        known = [part for part in parts if part is not None]
        rows = [torch.zeros_like(known[0].values) if part is None else part.values for part in parts]
        sums = torch.stack([part.sums for part in known if part.sums is not None]).sum(0)
        return Samples(torch.cat(rows), known[0].num_probes, sums)


def _sums(task: ScoringTask, batch: ScoredBatch) -> Samples:
    factors = _FactorPass(task, batch)
    directions = factors.run()
    repeats, scale = max(directions.num_probes, 1), task.precision.scale
    for module, cotangents in factors.cotangent_moments.items():
        factors.cotangent_moments[module] = cotangents / (repeats * scale**2)
    return Samples(factors.values / (repeats * scale**2), directions.num_probes, factors.sums())


class _FactorPass(BackwardPass):
    """Adds up both factors of every group's reader."""

    def __init__(self, task: ScoringTask, batch: ScoredBatch):
        self.dtype = torch.promote_types(task.model.dtype, torch.float32)
        self.values = torch.zeros(batch.size, sum(task.counts), dtype=self.dtype, device=task.device)
        columns = self.values.split(task.counts, dim=1)
        readers = [group.reader for group in task.groups]
        self.columns = {reader.module: part for reader, part in zip(readers, columns, strict=True)}
        self.cotangent_moments: dict[nn.Module, torch.Tensor] = {
            reader.module: self.values.new_zeros(2 * (reader.out_features,)) for reader in readers
        }
        super().__init__(task, batch, readers)

    def receive(self, module: nn.Module, tokens: torch.Tensor, cotangents: torch.Tensor) -> None:
        columns = self.columns[module]
        norms = squared_gradient_norms(tokens, cotangents)
        columns += norms.unflatten(1, (columns.shape[1], -1)).sum(2)
        flat = cotangents.flatten(0, -2).to(self.dtype)
        self.cotangent_moments[module] += products(flat)

    def sums(self) -> torch.Tensor:
        """Returns all sums in one vector, in the layout that `_factors` reads."""
        mask, parts = self.batch.inputs.get("attention_mask"), []
        for module, cotangents in self.cotangent_moments.items():
            tokens = torch.cat([valid_tokens(call, mask) for call in self.inputs[module]]).to(self.dtype)
            count = tokens.new_tensor([len(tokens)])
            parts += [count, tokens.sum(0), products(tokens).flatten(), cotangents.flatten()]
        return torch.cat(parts)


def num_sums(task: ScoringTask) -> int:
    """Computes the length of the vector of sums."""
    return sum(sum(_lengths(group)) for group in task.groups)


def surgeon_costs(task: ScoringTask, moments: SampleMoments, progress: bool = False) -> Finished:
    """Computes the cost of removing each component, after its predecessors and with a refit of the remaining ones.

    See [`removal_costs`] for the cost.

    Args:
        task (`ScoringTask`): The model and the scored components.
        moments (`SampleMoments`): The sums over all batches.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `Finished`: The costs, float64, and each component's place in its group's order of removal. A cost is the
            running maximum in that order, so no component has a lower cost than the ones removed before it.
    """
    costs, places = [], []
    bars = tqdm(task.groups, desc="Costs of removal", disable=None if progress else True, leave=False)
    for group, (moment, cotangents) in zip(bars, _factors(task.groups, moments), strict=True):
        weight = group.reader.matrix(whole_values(group.reader.module.weight)).cpu().double()
        size = group.reader.in_features // group.num_components
        order, steps = removal_costs(moment, weight.T @ cotangents @ weight, size)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        costs.append(steps.cummax(0).values[place])
        places.append(place)
    return Finished(torch.cat(costs), torch.cat(places))


def _factors(groups: list[Group], moments: SampleMoments) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields every reader's A, shape `(inputs, inputs)`, and C, shape `(outputs, outputs)`."""
    parts = iter(moments.sums.split([length for group in groups for length in _lengths(group)]))
    for reader in (group.reader for group in groups):
        count, total, squares, cotangents = (next(parts) for _ in range(4))
        moment = squares.view(2 * (reader.in_features,)) / count
        if reader.has_bias:
            moment = moment - torch.outer(total, total) / count**2
        yield moment, cotangents.view(2 * (reader.out_features,)) / moments.num_examples


def _lengths(group: Group) -> tuple[int, int, int, int]:
    inputs, outputs = group.reader.in_features, group.reader.out_features
    return 1, inputs, inputs**2, outputs**2


register_method(
    "kronecker",
    Method(
        kronecker,
        relative_trace,
        surgeon_costs,
        num_sums,
        curvature="logits",
        comparable=True,
        foresees_refit=True,
        in_loss_units=True,
    ),
)
