"""Backpropagates output directions through one batch's graph, and collects what selected projections receive."""

import functools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..components.projections import Projection
from .batches import ScoredBatch
from .output_curvature import OutputDirections, output_directions
from .outputs import graph_nodes, logits_of, noted_outputs, reached_first
from .second_derivatives import named_second_derivatives
from .task import ScoringTask


# Name of the nodes in which a graph ends.
LEAF = "torch::autograd::AccumulateGrad"


class SharedByExamplesError(Exception):
    """A module's input is shared by all examples: its first dimension is not a multiple of the number of examples."""


class BackwardPass(ABC):
    """Backpropagates output directions, and passes the projections' inputs and cotangents to `receive`.

    Weights are frozen. The graph starts at the first projections' outputs, which are made to require gradients. With
    gradient checkpointing it starts at embeddings, which require gradients even if frozen, of an encoder and a decoder
    at both. Nothing before is differentiated.

    A module may be called several times per pass: layers may share weights, a feed-forward block may run in chunks.
    Its gradient is then the sum over the tokens of all calls.

    Args:
        task (`ScoringTask`): The model and its loss.
        batch (`ScoredBatch`): The examples.
        projections (`Iterable[Projection]`): The projections. For a fused projection any of its parts will do.
        with_outputs (`Iterable[Projection]`, *optional*): Projections whose outputs are kept.
    """

    def __init__(
        self,
        task: ScoringTask,
        batch: ScoredBatch,
        projections: Iterable[Projection],
        with_outputs: Iterable[Projection] = (),
    ):
        self.task, self.batch = task, batch
        self.outputs: dict[nn.Module, list[torch.Tensor]] = {view.module: [] for view in with_outputs}
        self.views = {projection.module: projection for projection in projections}
        self.leaves: list[torch.Tensor] = []
        self.inputs: dict[nn.Module, list[torch.Tensor]] = defaultdict(list)
        self.cotangents: dict[nn.Module, dict[int, torch.Tensor]] = defaultdict(dict)

    @abstractmethod
    def receive(self, module: nn.Module, tokens: torch.Tensor, cotangents: torch.Tensor) -> None:
        """Processes one module's inputs and cotangents for one direction.

        Args:
            module (`nn.Module`): The module.
            tokens (`torch.Tensor`): The module's inputs, shape `(examples, tokens, features)`.
            cotangents (`torch.Tensor`): The cotangents of its outputs, shape `(examples, tokens, features)`. They
                belong to each example's loss, multiplied by `task.precision.scale`.
        """

    def finish_direction(self) -> None:  # noqa: B027  # Few passes have something to do.
        """Processes what `receive` has kept of all modules for one direction."""

    def run(self) -> OutputDirections:
        """Runs the model and backpropagates all directions.

        Returns:
            `OutputDirections`: The directions. Their iterator is exhausted.

        Raises:
            SharedByExamplesError: If a projection's input is shared by all examples.
            ValueError: If the loss's Hessian in the logits cannot be factored.
        """
        handles = [module.register_forward_hook(self._record) for module in self.views]
        handles += [module.register_forward_hook(self._keep_output) for module in self.outputs]
        try:
            with captured_outputs(self.task) as captured:
                loss = self.task.loss(self.batch)
        finally:
            for handle in handles:
                handle.remove()
        outputs = captured_logits(self.task, captured, loss)
        directions = directions_of_batch(self.task, self.batch, loss, outputs)
        self.leaves = [node.variable for node in graph_nodes(loss) if node.name() == LEAF]
        del loss
        try:
            for k, cotangents in enumerate(directions.cotangents):
                last = k == directions.count - 1
                scaled = [self.task.precision.scale * cotangent for cotangent in cotangents]
                torch.autograd.grad(outputs, self.leaves, scaled, retain_graph=not last, allow_unused=True)
                for module in list(self.cotangents):
                    self._hand_on(module)  # Some calls of this module do not contribute to the outputs.
                self.finish_direction()
        finally:
            # The graph's hooks refer to this object. The graph would otherwise stay until the next garbage collection.
            self.leaves.clear()
        return directions

    def outputs_of(self, projection: Projection) -> torch.Tensor:
        """What a projection's module gave in all its calls, shape `(examples, tokens, features)`."""
        outputs = self.outputs[projection.module]
        return _joined([projection.cotangents(output, self.batch.size) for output in outputs])

    def _keep_output(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self.outputs[module].append(output.detach())

    def _record(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if args[0].shape[0] % self.batch.size:
            raise SharedByExamplesError
        call = len(self.inputs[module])
        self.inputs[module].append(args[0].detach())
        # A copy of a leaf may be changed in place, as OLMo clips it; a leaf may not.
        given = output if output.requires_grad else output.requires_grad_().clone()
        output.register_hook(functools.partial(self._collect, module, call))
        return given

    def _collect(self, module: nn.Module, call: int, cotangent: torch.Tensor) -> None:
        received = self.cotangents[module]
        received[call] = cotangent
        if len(received) == len(self.inputs[module]):
            self._hand_on(module)

    def _hand_on(self, module: nn.Module) -> None:
        received, inputs = self.cotangents.pop(module), self.inputs[module]
        view, size = self.views[module], self.batch.size
        cotangents = _joined([view.cotangents(received[call], size) for call in sorted(received)])
        tokens = _joined([view.tokens(inputs[call], size) for call in sorted(received)]).to(cotangents.dtype)
        self.receive(module, tokens, cotangents)


def _joined(calls: list[torch.Tensor]) -> torch.Tensor:
    """Joins the tokens of all calls of a module, shape `(examples, tokens, features)`."""
    return calls[0] if len(calls) == 1 else torch.cat(calls, 1)


def directions_of_batch(
    task: ScoringTask, batch: ScoredBatch, loss: torch.Tensor, outputs: list[torch.Tensor]
) -> OutputDirections:
    """Computes the directions to backpropagate for a batch.

    Raises:
        ValueError: If the loss has no second derivative, or its Hessian in the logits cannot be factored.
    """
    with named_second_derivatives(task, loss, "logits", outputs):
        probes, generator = task.num_probes, task.generator(batch)
        return output_directions(loss, outputs, batch.size, probes, generator, task.exact_directions)


@contextmanager
def captured_outputs(task: ScoringTask) -> Iterator[list[Any]]:
    """Keeps what the model returns while `loss_fn` runs, in a list of one.

    Raises:
        ValueError: If the model is called more than once.
    """
    captured: list[Any] = []

    def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if captured:
            raise ValueError("loss_fn called the model more than once. This method needs a loss of one call's logits.")
        captured.append(outputs)

    handle = task.model.register_forward_hook(hook)
    try:
        yield captured
    finally:
        handle.remove()


def captured_logits(task: ScoringTask, captured: list[Any], loss: torch.Tensor) -> list[torch.Tensor]:
    """The logits that a loss was computed from, among what the model returned.

    Logits that reach the loss through other ones alone do not count: distilled DeiT returns two and their mean.

    Raises:
        ValueError: If there are none.
    """
    named = logits_of(captured[0], loss) if captured else {}
    logits = noted_outputs(loss) or list((reached_first(loss, named) or named).values())
    if not logits:
        raise ValueError(
            f"No output of {type(task.model).__name__} leads to {task.loss_name}. The methods 'kronecker', "
            "'gauss_newton_trace' and 'fisher' need a loss that is computed from the outputs of one call of the model."
        )
    return logits
