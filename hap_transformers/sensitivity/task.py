"""What every scoring method gets, and what it gives for a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from ..components.groups import Group
from ..components.sharded import whole_values
from .batches import ScoredBatch
from .precision import Precision


LossFunction = Callable[[PreTrainedModel, dict[str, Any]], torch.Tensor]


def model_loss(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """The loss that a Transformers model computes from its own labels.

    Raises:
        ValueError: If the model returns no loss.
    """
    loss = getattr(model(**inputs), "loss", None)  # A bare encoder's outputs have no such field.
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss: the batch has {sorted(inputs)} but no labels. Give batches "
            "with a 'labels' entry, or pass loss_fn."
        )
    return loss


@dataclass
class Samples:
    """What one batch says about every component.

    Args:
        values (`torch.Tensor`): Shape `(samples, num_components)`; a sample is an example, or a probe on all of them.
        num_probes (`int`): Random probes behind them, 0 if none.
        sums (`torch.Tensor`, *optional*): Whatever else the method sums up over examples, shape `(num_sums,)`.
    """

    values: torch.Tensor
    num_probes: int = 0
    sums: torch.Tensor | None = None


@dataclass
class ScoringTask:
    """A model in scoring mode, with the components to score.

    Args:
        model (`PreTrainedModel`): The model, in evaluation mode.
        groups (`list[Group]`): Groups with at least one component, kind by kind.
        loss_fn (`LossFunction`): Takes the model and a batch, returns the batch's mean loss.
        num_probes (`int`): Random probes per batch.
        precision (`Precision`): What forward passes run in.
        seed (`int`): Seed of the probes.
    """

    model: PreTrainedModel
    groups: list[Group]
    loss_fn: LossFunction
    num_probes: int
    precision: Precision
    seed: int

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def counts(self) -> list[int]:
        """Components of each group."""
        return [group.num_components for group in self.groups]

    def columns(self, kind: str) -> slice:
        """Where the components of a kind lie among all."""
        before = sum(self.counts[: [group.kind.name for group in self.groups].index(kind)])
        return slice(before, before + sum(g.num_components for g in self.groups if g.kind.name == kind))

    @cached_property
    def squared_norms(self) -> torch.Tensor:
        """||w_c||^2 of each component, shape `(num_components,)`, summed in float32 or better."""
        norms = []
        for group in self.groups:  # One group's squares at a time: all of them would be a second copy of the model.
            weights = [(p, whole_values(p).to(torch.promote_types(p.dtype, torch.float32))) for p in group.parameters]
            norms.append(group.sum_over_components({p: weight**2 for p, weight in weights}))
        return torch.cat(norms)

    def generator(self, batch: ScoredBatch) -> torch.Generator:
        """A fresh source of probes for a batch.

        It depends on the seed and the batch's number alone, so that probes are the same however batches are shared
        between processes, and after a resumption.
        """
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + batch.number)

    def loss(self, batch: ScoredBatch) -> torch.Tensor:
        """The batch's mean loss.

        Raises:
            ValueError: If the model cannot work on the batch, or the loss is not one finite number.
        """
        try:
            with self.precision.autocast():
                loss = self.loss_fn(self.model, dict(batch.inputs))
        except ValueError as error:
            raise ValueError(f"Batch {batch.number}: {error}") from error
        except (IndexError, RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            shapes = {name: tuple(v.shape) for name, v in batch.inputs.items() if isinstance(v, torch.Tensor)}
            raise ValueError(
                f"The loss of batch {batch.number}, {shapes}, cannot be computed: {error}. Check that tokens are in "
                "the vocabulary, labels in range, and inputs no longer than the model takes."
            ) from error
        if not isinstance(loss, torch.Tensor):
            raise ValueError(
                f"loss_fn returned a {type(loss).__name__}; it must return the batch's mean loss, a tensor."
            )
        if not loss.requires_grad:
            raise ValueError(
                f"The loss of batch {batch.number} does not depend on the model's weights or logits. Do not detach "
                "it, nor compute it under no_grad."
            )
        if loss.numel() != 1 or not torch.isfinite(loss):
            raise ValueError(
                f"The loss of batch {batch.number} is {loss.detach().tolist()}; scoring needs one finite number. "
                "Check the weights and the batch for NaN or infinity, and that labels are in range."
            )
        return loss
