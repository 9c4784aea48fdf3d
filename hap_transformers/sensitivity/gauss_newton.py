"""The exact trace of the Gauss-Newton matrix, all heads and neurons from one backward pass an output direction."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..blocks import Block
from ..projections import Projection
from .batches import ScoredBatch
from .ghost_norms import gram_matrix, prefers_ghost, squared_gradient_norms
from .output_curvature import OutputDirections, output_directions
from .task import Samples, ScoringTask


def gauss_newton_trace(task: ScoringTask, batch: ScoredBatch) -> Samples:
    r"""Every example's Gauss-Newton trace of every component.

    With z_i the outputs of example i and s_k the columns of a square root of the loss's Hessian in z,

        Tr(G_cc) = mean_i sum_k || d(s_k . z_i) / dw_c ||^2,

    so one backward pass a direction gives all components, and there is no probe noise. The norms are taken from the
    inputs and output gradients of the projections ([`squared_gradient_norms`]); weights stay frozen and no gradient of
    a weight is formed. For a loss like cross-entropy G is the Fisher information, and equals the Hessian where the
    model fits its data (Martens, "New insights and perspectives on the natural gradient method",
    [arXiv 1412.1193](https://arxiv.org/abs/1412.1193)). Where examples have many outputs, random mixtures of the
    directions take their place (see [`output_directions`]); the estimate is then unbiased instead of exact. Where a
    module works for all examples at once (DeBERTa projects its relative positions by the query and key projections),
    examples are taken one by one, as their gradients cannot be told apart otherwise.

    Raises:
        ValueError: If the loss cannot be factored.
    """
    try:
        return _traces(task, batch)
    except _SharedByExamplesError:
        parts = [_traces(task, part) for part in batch.split(1)]
        return Samples(torch.cat([part.values for part in parts]), parts[0].num_probes)


def _traces(task: ScoringTask, batch: ScoredBatch) -> Samples:
    backward = _BackwardPass(task, batch.size)
    with backward.recording(), captured_logits(task) as outputs:
        loss = task.loss(batch)
    directions = directions_of_batch(task, batch, loss, outputs)
    del loss
    backward.run(outputs, directions)
    repeats = max(directions.num_probes, 1)
    return Samples(backward.values / (repeats * task.precision.scale**2), directions.num_probes)


def directions_of_batch(
    task: ScoringTask, batch: ScoredBatch, loss: torch.Tensor, outputs: list[torch.Tensor]
) -> OutputDirections:
    """The directions to send back for a batch."""
    if not outputs:
        raise ValueError(
            f"{type(task.model).__name__} gave no output with 'logits' in its name when loss_fn ran; methods "
            "'gauss_newton_trace' and 'fisher' need a loss that is computed from the logits of one call of the model."
        )
    return output_directions(loss, outputs, batch.size, task.num_probes, task.generator(batch))


@contextmanager
def captured_logits(task: ScoringTask) -> Iterator[list[torch.Tensor]]:
    """Collects what the model outputs under a name with "logits" while `loss_fn` runs."""
    logits: list[torch.Tensor] = []

    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if logits:
            raise ValueError("loss_fn called the model more than once; this method needs a loss of one call's logits.")
        logits[:] = [value for name, value in outputs.items() if "logits" in name and value.is_floating_point()]

    handle = task.model.register_forward_hook(hook)
    try:
        yield logits
    finally:
        handle.remove()


class _SharedByExamplesError(Exception):
    """A module was called on something else than a number of tokens of every example."""


class _BackwardPass:
    """Sends output directions back through one batch's graph and sums up the components' squared gradient norms.

    Weights are frozen, so the graph starts at the first projections' outputs, which are made to require gradients;
    nothing before them is differentiated. A module may be called several times a pass (layers that share weights, a
    feed-forward block in chunks): its gradient is the sum over all calls' tokens.
    """

    def __init__(self, task: ScoringTask, examples: int):
        self.task, self.examples = task, examples
        dtype = torch.promote_types(task.model.dtype, torch.float32)
        self.values = torch.zeros(examples, sum(task.counts), dtype=dtype, device=task.device)
        self.leaves: list[torch.Tensor] = []
        self.inputs: dict[nn.Module, list[torch.Tensor]] = defaultdict(list)
        self.cotangents: dict[nn.Module, dict[int, torch.Tensor]] = defaultdict(dict)
        self.grams: dict[tuple, torch.Tensor] = {}
        self.owners: dict[nn.Module, list[tuple[Block, Projection, torch.Tensor]]] = defaultdict(list)
        for block, columns in zip(task.blocks, self.values.split(task.counts, dim=1), strict=True):
            for projection in (*block.inputs, block.output):
                self.owners[projection.module].append((block, projection, columns))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps what the projections read while the model runs, and starts the graph."""
        handles = [module.register_forward_hook(self._record) for module in self.owners]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, outputs: list[torch.Tensor], directions: OutputDirections) -> None:
        """Sends the directions back; `values` then has the sums over them, shape `(examples, num_components)`."""
        try:
            for k, cotangents in enumerate(directions.cotangents):
                last = k == directions.count - 1
                scaled = [self.task.precision.scale * cotangent for cotangent in cotangents]
                torch.autograd.grad(outputs, self.leaves, scaled, retain_graph=not last, allow_unused=True)
                for module in list(self.cotangents):
                    self._add_norms(module)  # Some of its calls did not contribute to the outputs.
        finally:
            # The graph's hooks refer to this object: else the graph would stay until the next garbage collection.
            self.leaves.clear()

    def _record(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if args[0].shape[0] % self.examples:
            raise _SharedByExamplesError
        call = len(self.inputs[module])
        self.inputs[module].append(args[0].detach())
        if not output.requires_grad:
            self.leaves.append(output.requires_grad_())
        output.register_hook(functools.partial(self._receive, module, call))

    def _receive(self, module: nn.Module, call: int, cotangent: torch.Tensor) -> None:
        received = self.cotangents[module]
        received[call] = cotangent
        if len(received) == len(self.inputs[module]):
            self._add_norms(module)

    def _add_norms(self, module: nn.Module) -> None:
        received, inputs = self.cotangents.pop(module), self.inputs[module]
        gradient = self._tokens([received[call] for call in sorted(received)])
        tokens = self._tokens([inputs[call] for call in sorted(received)]).to(gradient.dtype)
        for block, projection, columns in self.owners[module]:
            if projection is block.output:
                norms = squared_gradient_norms(tokens, gradient)
            else:
                own = projection.outputs_of(gradient)
                norms = squared_gradient_norms(own, tokens, self._gram(inputs, tokens, own), module.bias is not None)
            columns += norms.unflatten(1, (block.num_components, -1)).sum(2)

    def _tokens(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Concatenates the tokens of a module's calls, shape `(examples, tokens, features)`."""
        views = [tensor.reshape(self.examples, -1, tensor.shape[-1]) for tensor in tensors]
        return views[0] if len(views) == 1 else torch.cat(views, 1)

    def _gram(self, inputs: list[torch.Tensor], tokens: torch.Tensor, owned: torch.Tensor) -> torch.Tensor | None:
        """The tokens' Gram matrix, computed once for query, key and value and for all directions."""
        if owned.dtype == torch.float16 or not prefers_ghost(owned, tokens):
            return None
        key = (*(tensor.data_ptr() for tensor in inputs), inputs[0].shape)
        if key not in self.grams:
            self.grams[key] = gram_matrix(tokens)
        return self.grams[key]
