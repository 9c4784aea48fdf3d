"""Batches as scoring sees them: cut to a number of examples, on the model's device, with a loss that is checked."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


LossFunction = Callable[[PreTrainedModel, dict[str, Any]], torch.Tensor]


def model_loss(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """The loss that a Transformers model computes from its own labels.

    Raises:
        ValueError: If the model returns no loss.
    """
    loss = model(**inputs).loss
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss: the batch has {sorted(inputs)} but no labels. Give batches "
            "with a 'labels' entry, or pass loss_fn."
        )
    return loss


@dataclass
class ScoredBatch:
    """One batch of examples.

    Args:
        inputs (`dict[str, Any]`): What the loss function gets.
        size (`int`): Number of examples.
        number (`int`): Position among the batches, for messages.
    """

    inputs: dict[str, Any]
    size: int
    number: int

    def checked_loss(self, loss_fn: LossFunction, model: PreTrainedModel) -> torch.Tensor:
        """The batch's mean loss.

        Raises:
            ValueError: If the loss is not one finite number.
        """
        loss = loss_fn(model, dict(self.inputs))
        if loss.numel() != 1 or not torch.isfinite(loss):
            raise ValueError(
                f"The loss of batch {self.number} is {loss.detach().tolist()}; scoring needs one finite number. Check "
                "the weights and the batch for NaN or infinity, and that labels are in range."
            )
        return loss


def scored_batches(
    batches: Iterable[Mapping[str, Any]], device: torch.device, max_examples: int | None
) -> Iterator[ScoredBatch]:
    """Moves batches to the device and stops after `max_examples` examples, cutting the last batch.

    Raises:
        ValueError: If there is no example at all, or a batch has no tensors.
    """
    seen = 0
    for number, batch in enumerate(batches):
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim]
        if not tensors:
            raise ValueError(f"Batch {number} has no tensors (its entries: {sorted(batch)}).")
        size = len(tensors[0])
        if max_examples is not None and seen + size > max_examples:
            size = max_examples - seen
        if size == 0:
            break
        inputs = {
            key: value[:size].to(device) if isinstance(value, torch.Tensor) and value.ndim else value
            for key, value in batch.items()
        }
        yield ScoredBatch(inputs, size, number)
        seen += size
    if not seen:
        raise ValueError("No examples to score: `batches` is empty.")
