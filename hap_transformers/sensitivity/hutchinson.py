"""Estimates the Hessian's trace by Hutchinson's method; each probe gives all components."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..components.groups import Group
from ..components.projections import Projection
from .batches import ScoredBatch
from .methods import Method, register_method
from .probes import rademacher
from .relative_trace import relative_trace
from .second_derivatives import named_second_derivatives
from .task import Samples, ScoringTask


# Examples per double-backward graph: few bound the memory. Each graph draws other probes, so several small graphs also
# average out more noise than one large graph.
EXAMPLES_A_GRAPH = 16


def hessian_trace(task: ScoringTask, batch: ScoredBatch) -> Samples:
    r"""Estimates every component's Hessian trace by random probes.

    Let v be uniform on {-1, 1} over all scored weights. The sum of v * Hv over a component c is an unbiased estimate
    of the component's trace,

        Tr(H_cc) = E[ v_c . (Hv)_c ]

    (Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989; HAP,
    [arXiv 2101.08940](https://arxiv.org/abs/2101.08940)). For a projection y = W x with output gradient g, where d
    denotes the derivative in the direction v,

        v . (Hv)_W = sum_t dg_t . (v x_t)  +  sum_t g_t . (v dx_t).

    The second sum has mean zero, because x does not depend on W. It is noise and is left out. The first sum needs only
    dg, which is the gradient in y of the loss's directional derivative sum g . (v x). So no gradient of a weight is
    formed, and weights stay frozen. A probe takes four matrix products per projection, or five if components
    correspond to columns of it. A Hessian-vector product would take six. One double-backward graph of up to
    `EXAMPLES_A_GRAPH` examples serves `num_probes` probes.

    Returns:
        `Samples`: One sample per probe.

    Raises:
        ValueError: If the model's attention kernel has no second derivatives, the loss depends on no projection, or a
            projection is called several times per pass (its input then depends on its weights).
    """
    kernel = task.model.config._attn_implementation
    if kernel not in ("eager", "sdpa"):
        raise ValueError(
            f"method='hessian_trace' needs second derivatives, which attn_implementation='{kernel}' does not support. "
            "Load the model with attn_implementation='sdpa' or 'eager', or use method='gauss_newton_trace'."
        )
    generator = task.generator(batch)
    # Fused attention has no double backward; the math kernel does.
    with sdpa_kernel(SDPBackend.MATH):
        parts = _parts(task, batch)
        values = [part.size / batch.size * _probe(task, part, generator) for part in parts]
    return Samples(torch.stack(values).sum(0), task.num_probes)


@dataclass
class Owned:
    """A module of whose weights components own rows, columns, or both.

    Args:
        view (`Projection`): The module, or any of its parts.
        written (`bool`): Whether components own its rows.
        read (`bool`): Whether components own its columns.
    """

    view: Projection
    written: bool = False
    read: bool = False

    def draw(self, output: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draws random signs for the weight, shape `(outputs, inputs)`, and for a bias that components include."""
        shape = self.view.module_matrix(self.view.module.weight).shape
        weight = rademacher(shape, output, generator)
        owns_bias = self.written and self.view.has_bias
        return weight, rademacher(shape[:1], output, generator) if owns_bias else None


Owners = dict[nn.Module, Owned]


def _parts(task: ScoringTask, batch: ScoredBatch) -> list[ScoredBatch]:
    """Splits a batch into graphs, if its loss is the mean over examples.

    A mean over tokens or over weighted classes may differ from the mean over examples. The batch then stays whole.
    """
    parts = batch.split(EXAMPLES_A_GRAPH)
    if len(parts) == 1:
        return parts

    def mean_loss(group: list[ScoredBatch]) -> torch.Tensor:
        first, *others = (part.size / batch.size * task.loss_fn(task.model, dict(part.inputs)) for part in group)
        return sum(others, first)

    with torch.no_grad():
        return parts if torch.isclose(mean_loss([batch]), mean_loss(parts), rtol=1e-4) else [batch]


def _probe(task: ScoringTask, batch: ScoredBatch, generator: torch.Generator) -> torch.Tensor:
    """Draws probes for one graph, and returns their estimates, shape `(num_probes, num_components)`."""
    owners: Owners = {}
    for group in task.groups:
        for projection in group.writers:
            owners.setdefault(projection.module, Owned(projection)).written = True
        for projection in group.readers:
            owners.setdefault(projection.module, Owned(projection)).read = True
    with _recorded_calls(owners) as calls:
        loss = task.loss(batch)
    if not calls or not loss.requires_grad:
        raise ValueError("The loss does not depend on any component, so it has no Hessian in their weights.")
    with named_second_derivatives(task, loss, "weights"):
        return _estimates(task, loss, owners, calls, generator)


def _estimates(
    task: ScoringTask,
    loss: torch.Tensor,
    owners: Owners,
    calls: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]],
    generator: torch.Generator,
) -> torch.Tensor:
    outputs, values, scale = [y for _, y in calls.values()], [], task.precision.scale
    gradients = torch.autograd.grad(loss * scale, outputs, create_graph=True, materialize_grads=True)
    if scale != 1 and not all(gradient.isfinite().all() for gradient in gradients):
        # The loss scale is too large. The batch is repeated with a smaller one; no probe need be drawn before.
        return torch.full((task.num_probes, sum(task.counts)), torch.inf, device=task.device)
    for probe in range(task.num_probes):
        probes = {module: owners[module].draw(y, generator) for module, (_, y) in calls.items()}
        moves = [owners[module].view.applied(x.to(y.dtype), *probes[module]) for module, (x, y) in calls.items()]
        # The gradient of sum g . (v x). Both g and x depend on the outputs.
        factors = zip((*gradients, *moves), (*moves, *gradients), strict=True)
        terms = [(factor, other.detach()) for factor, other in factors if factor.requires_grad]
        last = probe == task.num_probes - 1
        changes = torch.autograd.grad(
            [t for t, _ in terms], outputs, [c for _, c in terms], retain_graph=not last, materialize_grads=True
        )
        by_rows, by_columns = {}, {}
        for (module, (x, _)), move, change in zip(calls.items(), moves, changes, strict=True):
            owned, size = owners[module], len(x)
            changed = owned.view.cotangents(change, size)
            if owned.written:
                by_rows[module] = _sum_over_tokens(owned.view.cotangents(move, size), changed)
            if owned.read:
                by_columns[module] = _sum_over_tokens(owned.view.tokens(x, size), changed @ probes[module][0])
        values.append(torch.cat([_sum_over_components(group, by_rows, by_columns) for group in task.groups]) / scale)
    return torch.stack(values)


@contextmanager
def _recorded_calls(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]]:
    """Collects each module's inputs and outputs. Weights are frozen, so the graph starts at the first outputs."""
    calls: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def record(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if module in calls:
            raise ValueError(
                f"A {type(module).__name__} is called more than once per pass. method='hessian_trace' does not "
                "support this; use method='gauss_newton_trace'."
            )
        calls[module] = args[0], output if output.requires_grad else output.requires_grad_()

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _sum_over_tokens(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Sums products of two tensors over all tokens, per feature, in float32 or better; shape `(features,)`."""
    products = (first.detach() * second).flatten(0, -2)
    return products.sum(0, dtype=torch.promote_types(products.dtype, torch.float32))


def _sum_over_components(
    group: Group, by_rows: dict[nn.Module, torch.Tensor], by_columns: dict[nn.Module, torch.Tensor]
) -> torch.Tensor:
    parts = [projection.outputs_of(by_rows[projection.module]) for projection in group.writers]
    parts += [by_columns[reader.module] for reader in group.readers]
    return torch.stack([part.reshape(group.num_components, -1).sum(1) for part in parts]).sum(0)


register_method(
    "hessian_trace",
    Method(
        hessian_trace,
        relative_trace,
        curvature="weights",
        comparable=True,
        in_loss_units=True,
        has_traces=True,
        per_example=False,
        scores_sharded=False,
        # Its probes belong to whole modules, and fused projections are those of both kinds.
        except_kinds=("embedding_dims", "query_key_dims", "value_dims"),
    ),
)
