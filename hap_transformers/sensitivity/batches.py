"""Batches as scoring sees them: numbered, counted, cut to a number of examples."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device


EXAMPLES_FIRST = ("labels", "input_ids", "pixel_values", "inputs_embeds", "input_features")


@dataclass
class ScoredBatch:
    """One batch of examples.

    Args:
        inputs (`dict[str, Any]`): What the loss function gets.
        size (`int`): Number of examples.
        number (`int`): Position among the batches.
        first (`int`): Position of its first example among all examples.
    """

    inputs: dict[str, Any]
    size: int
    number: int
    first: int

    def split(self, size: int) -> list["ScoredBatch"]:
        """The same examples in batches of at most `size`."""
        return [
            ScoredBatch(
                inputs=_cut(self.inputs, self.size, slice(start, start + size)),
                size=min(size, self.size - start),
                number=self.number,
                first=self.first + start,
            )
            for start in range(0, self.size, size)
        ]

    def to(self, device: torch.device) -> "ScoredBatch":
        """The same batch on a device."""
        return ScoredBatch(send_to_device(self.inputs, device), self.size, self.number, self.first)


def scored_batches(batches: Iterable[Mapping[str, Any]], max_examples: int | None) -> Iterator[ScoredBatch]:
    """Numbers batches and stops after `max_examples` examples, cutting the last batch.

    Raises:
        ValueError: If there is no example at all, or a batch is no dictionary or has no tensors.
    """
    seen = 0
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(f"Batch {number} is a {type(batch).__name__}; give dictionaries of model inputs.")
        tensors = {name: v for name, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim}
        if not tensors:
            raise ValueError(f"Batch {number} has no tensors (its entries: {sorted(batch)}).")
        # Not every tensor has the examples in its first dimension; these do.
        found = len(next((tensors[name] for name in EXAMPLES_FIRST if name in tensors), next(iter(tensors.values()))))
        size = found if max_examples is None else min(found, max_examples - seen)
        if size == 0:
            break
        yield ScoredBatch(_cut(batch, found, slice(size)), size, number, seen)
        seen += size
    if not seen:
        raise ValueError("No examples to score: `batches` is empty.")


def _cut(inputs: Mapping[str, Any], size: int, examples: slice) -> dict[str, Any]:
    """The given examples of every tensor that has `size` of them; whatever else is in a batch is for all examples."""
    return {
        name: value[examples] if isinstance(value, torch.Tensor) and value.ndim and len(value) == size else value
        for name, value in inputs.items()
    }
