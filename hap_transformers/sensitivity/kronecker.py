"""Estimates the output projections' Kronecker-factored curvature, and from it the cost of removals after a refit."""

from collections.abc import Iterator

import torch
from torch import nn
from tqdm.auto import tqdm

from ..components.groups import Group
from ..components.sharded import whole_values
from ..tokens import products, valid_tokens
from .backward_pass import BackwardPass, SharedByExamplesError
from .batches import ScoredBatch, counts, shifts_labels
from .ghost_norms import squared_gradient_norms
from .methods import Finished, Method, register_method
from .relative_trace import relative_trace
from .statistics import SampleMoments
from .surgeon import elimination_bytes, removal_costs
from .task import Samples, ScoringTask


# Bytes for the matrices of projections that are worked on together, where that is faster.
TOGETHER = 4 * 2**30


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
        shifted = shifts_labels(task.model)
        parts = [_sums(task, part) if counts(part.inputs, shifted) else None for part in batch.split(1)]
        known = [part for part in parts if part is not None]
        rows = [torch.zeros_like(known[0].values) if part is None else part.values for part in parts]
        sums = (torch.stack(parts).sum(0) for parts in zip(*(part.sums for part in known), strict=True))
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

    def sums(self) -> Iterator[torch.Tensor]:
        """Yields all sums in the order in which `_factors` reads them."""
        mask = self.batch.inputs.get("attention_mask")
        for module, cotangents in self.cotangent_moments.items():
            tokens = torch.cat([valid_tokens(call, mask) for call in self.inputs.pop(module)]).to(self.dtype)
            yield tokens.new_tensor(len(tokens))
            yield tokens.sum(0)
            yield products(tokens)
            yield cotangents


def num_sums(task: ScoringTask) -> int:
    """Computes how many numbers the sums are."""
    return sum(sum(_lengths(group)) for group in task.groups)


def surgeon_costs(task: ScoringTask, moments: SampleMoments, progress: bool = False) -> Finished:
    """Computes the cost of removing each component, after its predecessors and with a refit of the remaining ones.

    See [`removal_costs`] for the cost. Projections of equal shape are worked on together where the device gains by it.

    Args:
        task (`ScoringTask`): The model and the scored components.
        moments (`SampleMoments`): The sums over all batches.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `Finished`: The costs, float64, and each component's place in its group's order of removal. A cost is the
            running maximum in that order, so no component has a lower cost than the ones removed before it.
    """
    sums = moments.sums.split([sum(_lengths(group)) for group in task.groups])
    costs, places = ([torch.empty(0)] * len(task.groups) for _ in range(2))
    with tqdm(total=len(task.groups), desc="Costs of removal", disable=None if progress else True, leave=False) as bar:
        for alike in _alike(task):
            groups = [task.groups[i] for i in alike]
            factors = [_moment_and_curvature(task.groups[i], sums[i], moments.num_examples) for i in alike]
            moment, curvature = (torch.stack(matrices) for matrices in zip(*factors, strict=True))
            del factors
            order, steps = removal_costs(moment, curvature, groups[0].reader.in_features // groups[0].num_components)
            place = order.argsort(1)
            running = steps.cummax(1).values.gather(1, place)
            for i, cost, position in zip(alike, running.cpu(), place.cpu(), strict=True):
                costs[i], places[i] = cost, position
            bar.update(len(groups))
    return Finished(torch.cat(costs), torch.cat(places))


def _alike(task: ScoringTask) -> Iterator[list[int]]:
    """Positions of the groups to work on together: of one shape, and as many as the memory allows."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, group in enumerate(task.groups):
        shapes.setdefault((group.reader.in_features, group.num_components), []).append(i)
    for (inputs, _), positions in shapes.items():
        # A processor's caches hold no more than one.
        count = 1 if task.sums_device.type == "cpu" else max(1, TOGETHER // elimination_bytes(inputs))
        for start in range(0, len(positions), count):
            yield positions[start : start + count]


def _moment_and_curvature(group: Group, sums: torch.Tensor, examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A reader's A, and W^T C W, both of shape `(inputs, inputs)`."""
    reader = group.reader
    count, total, squares, cotangents = sums.split(_lengths(group))
    moment = squares.view(2 * (reader.in_features,)) / count
    if reader.has_bias:
        moment -= torch.outer(total, total) / count**2
    weight = reader.matrix(whole_values(reader.module.weight)).to(sums)
    return moment, weight.T @ (cotangents.view(2 * (reader.out_features,)) / examples) @ weight


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
        by_layer=True,
        curvature="logits",
        comparable=True,
        foresees_refit=True,
        in_loss_units=True,
    ),
)
