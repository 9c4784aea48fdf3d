"""Sends output directions back through one batch's graph, past every projection that is asked about."""

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
from .task import ScoringTask


class SharedByExamplesError(Exception):
    """A module was called on something else than a number of tokens of every example."""


class BackwardPass(ABC):
    """Sends output directions back, and hands on what projections read and the cotangents they receive.

    Weights are frozen, so the graph starts at the first projections' outputs, which are made to require gradients, or
    at their inputs, if these do already; nothing before them is differentiated. A module may be called several times a
    pass (layers that share weights, a feed-forward block in chunks): its gradient is the sum over all calls' tokens.

    Args:
        task (`ScoringTask`): The model and its loss.
        batch (`ScoredBatch`): The examples.
        projections (`Iterable[Projection]`): The projections; of a fused one, any part stands for the module.
    """

    def __init__(self, task: ScoringTask, batch: ScoredBatch, projections: Iterable[Projection]):
        self.task, self.batch = task, batch
        self.views = {projection.module: projection for projection in projections}
        self.leaves: list[torch.Tensor] = []
        self.inputs: dict[nn.Module, list[torch.Tensor]] = defaultdict(list)
        self.cotangents: dict[nn.Module, dict[int, torch.Tensor]] = defaultdict(dict)

    @abstractmethod
    def receive(self, module: nn.Module, tokens: torch.Tensor, cotangents: torch.Tensor) -> None:
        """Gets what a module read and received in one direction, each `(examples, tokens, features)`.

        Cotangents are those of each example's loss, times `task.precision.scale`.
        """

    def run(self) -> OutputDirections:
        """Runs the model and sends all directions back, which are then spent.

        Raises:
            SharedByExamplesError: If a projection works for all examples at once.
            ValueError: If the loss cannot be factored.
        """
        handles = [module.register_forward_hook(self._record) for module in self.views]
        try:
            with captured_logits(self.task) as outputs:
                loss = self.task.loss(self.batch)
        finally:
            for handle in handles:
                handle.remove()
        directions = directions_of_batch(self.task, self.batch, loss, outputs)
        del loss
        try:
            for k, cotangents in enumerate(directions.cotangents):
                last = k == directions.count - 1
                scaled = [self.task.precision.scale * cotangent for cotangent in cotangents]
                torch.autograd.grad(outputs, self.leaves, scaled, retain_graph=not last, allow_unused=True)
                for module in list(self.cotangents):
                    self._hand_on(module)  # Some of its calls did not contribute to the outputs.
        finally:
            # The graph's hooks refer to this object: else the graph would stay until the next garbage collection.
            self.leaves.clear()
        return directions

    def _record(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if args[0].shape[0] % self.batch.size:
            raise SharedByExamplesError
        call = len(self.inputs[module])
        self.inputs[module].append(args[0].detach())
        if not output.requires_grad:
            self.leaves.append(output.requires_grad_())
        elif not self.leaves:  # Gradient checkpointing lets embeddings require gradients, whatever is frozen.
            self.leaves.append(args[0])
        output.register_hook(functools.partial(self._collect, module, call))

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
    """The tokens of all calls of a module, shape `(examples, tokens, features)`."""
    return calls[0] if len(calls) == 1 else torch.cat(calls, 1)


def directions_of_batch(
    task: ScoringTask, batch: ScoredBatch, loss: torch.Tensor, outputs: list[torch.Tensor]
) -> OutputDirections:
    """The directions to send back for a batch."""
    if not outputs:
        raise ValueError(
            f"{type(task.model).__name__} gave no output with 'logits' in its name when loss_fn ran; methods "
            "'kronecker', 'gauss_newton_trace' and 'fisher' need a loss that is computed from the logits of one call "
            "of the model."
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
