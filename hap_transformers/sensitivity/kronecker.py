"""Estimates the output projections' Kronecker-factored curvature, and from it the cost of removals after a refit."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from ..components.architectures import get_architecture
from ..components.convolutions import ChannelNorms, Convolution
from ..components.groups import Group
from ..components.projections import Projection
from ..components.sharded import whole_values
from ..tokens import mask_of, products, valid_tokens, whole_calls
from .backward_pass import BackwardPass, SharedByExamplesError
from .batches import ScoredBatch, counts, shifts_labels
from .block_influence import BLOCK_INFLUENCE
from .ghost_norms import squared_gradient_norms
from .mask_costs import costs_without_refit
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
    projection, or the norm with running statistics behind it, has a bias, because the bias's refit compensates for
    their means. [`surgeon_costs`] turns the factors into costs of removal.

    The values of single examples are the Gauss-Newton traces of the output projections' columns, of convolutions
    without the products of different positions. They are proxy scores, used only to estimate the reliability. The
    final scores are the costs.

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
    for module, cotangents in factors.curvatures.items():
        factors.curvatures[module] = cotangents / (repeats * scale**2)
    return Samples(factors.values / (repeats * scale**2), directions.num_probes, factors.sums())


class _FactorPass(BackwardPass):
    """Adds up both factors of every group's reader, and of groups without readers the matrix over their masks."""

    def __init__(self, task: ScoringTask, batch: ScoredBatch):
        self.dtype = torch.promote_types(task.model.dtype, torch.float32)
        self.values = torch.zeros(batch.size, sum(task.counts), dtype=self.dtype, device=task.device)
        columns = self.values.split(task.counts, dim=1)
        # A fused projection is written by one group and read by none.
        views = [_view(group) for group in task.groups]
        self.columns = {view.module: part for view, part in zip(views, columns, strict=True)}
        self.curvatures: dict[nn.Module, torch.Tensor] = {
            view.module: self.values.new_zeros(2 * (view.out_features if group.readers else group.num_components,))
            for view, group in zip(views, task.groups, strict=True)
        }
        masked = [(group, projection) for group in task.groups for projection in group.masked]
        self.readers = {view.module: view for view in views}
        self.decoded = {view.module for view, group in zip(views, task.groups, strict=True) if group.decoded}
        self.masked = {projection.module: (_view(group).module, projection) for group, projection in masked}
        self.jacobians: dict[nn.Module, torch.Tensor] = {}
        outputs = [projection for _, projection in masked]
        # An image has too many positions for the norm of the sum over all.
        short = [ChannelNorms(view.name, view.module) for view in views if isinstance(view, Convolution)]
        self.by_position = {view.module for view in short}
        super().__init__(task, batch, [*views, *outputs, *short], outputs)

    def receive(self, module: nn.Module, tokens: torch.Tensor, cotangents: torch.Tensor) -> None:
        if module in self.masked:
            key, projection = self.masked[module]
            count = self.columns[key].shape[1]
            jacobian = mask_jacobian(projection, count, self.outputs_of(projection), cotangents.to(self.dtype))
            self.jacobians[key] = self.jacobians.get(key, 0) + jacobian
            return
        columns = self.columns[module]
        if module in self.by_position:
            norms = (tokens.square() * cotangents.square().sum(2, keepdim=True)).sum(1)
        else:
            norms = squared_gradient_norms(tokens, cotangents)
        columns += norms.unflatten(1, (columns.shape[1], -1)).sum(2)
        flat = cotangents.flatten(0, -2).to(self.dtype)
        self.curvatures[module] += products(flat)

    def finish_direction(self) -> None:
        for key, jacobian in self.jacobians.items():
            self.columns[key] += jacobian**2
            self.curvatures[key] += products(jacobian)
        self.jacobians.clear()

    def sums(self) -> Iterator[torch.Tensor]:
        """Yields all sums in the order in which `_lengths` counts them."""
        without_readers = {key for key, _ in self.masked.values()}
        for module, curvature in self.curvatures.items():
            if module not in without_readers:
                read = [self.readers[module].read(call) for call in self.inputs.pop(module)]
                mask = mask_of(self.batch.inputs, module in self.decoded)
                chunk = getattr(self.task.model.config, "chunk_size_feed_forward", 0)
                whole = whole_calls(read, mask, chunk)
                tokens = torch.cat([valid_tokens(call, mask) for call in whole]).to(self.dtype)
                yield tokens.new_tensor(len(tokens))
                yield tokens.sum(0)
                yield products(tokens)
            yield curvature


def _view(group: Group) -> Projection:
    """The projection whose cotangents a group's curvature is computed from."""
    return group.reader if group.readers else group.masked[0]


def mask_jacobian(
    projection: Projection, num_components: int, outputs: torch.Tensor, cotangents: torch.Tensor
) -> torch.Tensor:
    """Every example's derivatives in masks that multiply what a projection gives.

    Args:
        projection (`Projection`): The projection.
        num_components (`int`): How many components have equal parts of its outputs.
        outputs (`torch.Tensor`): What its module gave, shape `(examples, tokens, features)`.
        cotangents (`torch.Tensor`): Gradients of that, of the same shape.

    Returns:
        `torch.Tensor`: Shape `(examples, num_components)`.
    """
    features = (outputs * cotangents).sum(1)
    return projection.outputs_of(features).unflatten(-1, (num_components, -1)).sum(-1)


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
    by_input = get_architecture(task.model).norm_first  # Their streams have outliers.
    costs, places = ([torch.empty(0)] * len(task.groups) for _ in range(2))
    with tqdm(total=len(task.groups), desc="Costs of removal", disable=None if progress else True, leave=False) as bar:
        for alike in _alike(task):
            found = [task.groups[i] for i in alike], [sums[i] for i in alike]
            order, steps = _costs_of(*found, moments.num_examples, by_input)
            place = order.argsort(1)
            running = steps.cummax(1).values.gather(1, place)
            for i, cost, position in zip(alike, running.cpu(), place.cpu(), strict=True):
                costs[i], places[i] = cost, position
            bar.update(len(alike))
    return Finished(torch.cat(costs), torch.cat(places))


def _costs_of(
    groups: Sequence[Group], sums: Sequence[torch.Tensor], examples: int, by_input: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and costs of removal, shape `(groups, num_components)`, of groups of one shape."""
    if not groups[0].readers:
        matrices = [part.view(2 * (groups[0].num_components,)) / examples for part in sums]
        return costs_without_refit(torch.stack(matrices))
    factors = [moment_and_curvature(group, part, examples) for group, part in zip(groups, sums, strict=True)]
    moment, curvature = (torch.stack(matrices) for matrices in zip(*factors, strict=True))
    del factors
    size = groups[0].reader.in_features // groups[0].num_components
    return removal_costs(moment, curvature, size, by_input=by_input)


def _alike(task: ScoringTask) -> Iterator[list[int]]:
    """Positions of the groups to work on together: of one shape, and as many as the memory allows."""
    shapes: dict[tuple[bool, int, int], list[int]] = {}
    for i, group in enumerate(task.groups):
        # Groups without readers have matrices over their components.
        size = group.reader.in_features if group.readers else group.num_components
        shapes.setdefault((bool(group.readers), size, group.num_components), []).append(i)
    for (_, size, _), positions in shapes.items():
        # A processor's caches hold no more than one.
        count = 1 if task.sums_device.type == "cpu" else max(1, TOGETHER // elimination_bytes(size))
        for start in range(0, len(positions), count):
            yield positions[start : start + count]


def moment_and_curvature(group: Group, sums: torch.Tensor, examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A reader's A, and W^T C W, both of shape `(inputs, inputs)`, from a group's sums."""
    reader = group.reader
    count, total, squares, cotangents = sums.split(_lengths(group))
    moment = squares.view(2 * (reader.in_features,)) / count
    if reader.has_bias or group.norm is not None:
        moment -= torch.outer(total, total) / count**2
    weight = reader.matrix(whole_values(reader.module.weight)).to(sums)
    return moment, weight.T @ (cotangents.view(2 * (reader.out_features,)) / examples) @ weight


def _lengths(group: Group) -> tuple[int, ...]:
    if not group.readers:
        return (group.num_components**2,)
    inputs, outputs = group.reader.in_features, group.reader.out_features
    return 1, inputs, inputs**2, outputs**2


def _proxies(task: ScoringTask, means: torch.Tensor | None) -> torch.Tensor:
    """Scores from the means of single examples' values: relative traces, for masks halves."""
    assert means is not None  # Methods with samples receive their mean.
    halves = torch.cat([means.new_full((group.num_components,), not group.readers) for group in task.groups]).bool()
    return torch.where(halves, means / 2, relative_trace(task, means))


register_method(
    "kronecker",
    Method(
        kronecker,
        _proxies,
        surgeon_costs,
        num_sums,
        by_layer=True,
        curvature="logits",
        comparable=True,
        foresees_refit=True,
        in_loss_units=True,
        of_wholes=BLOCK_INFLUENCE,
    ),
)
