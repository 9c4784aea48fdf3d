"""Batches as scoring sees them: numbered, counted, cut to a number of examples."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


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
                inputs=_cut(self.inputs, slice(start, start + size)),
                size=min(size, self.size - start),
                number=self.number,
                first=self.first + start,
            )
            for start in range(0, self.size, size)
        ]

    def to(self, device: torch.device) -> "ScoredBatch":
        """The same batch on a device."""
        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in self.inputs.items()
        }
        return ScoredBatch(inputs, self.size, self.number, self.first)


def scored_batches(batches: Iterable[Mapping[str, Any]], max_examples: int | None) -> Iterator[ScoredBatch]:
    """Numbers batches and stops after `max_examples` examples, cutting the last batch.

    Raises:
        ValueError: If there is no example at all, or a batch has no tensors.
    """
    seen = 0
    for number, batch in enumerate(batches):
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim]
        if not tensors:
            raise ValueError(f"Batch {number} has no tensors (its entries: {sorted(batch)}).")
        size = len(tensors[0])
        if max_examples is not None:
            size = min(size, max_examples - seen)
        if size == 0:
            break
        yield ScoredBatch(_cut(batch, slice(size)), size, number, seen)
        seen += size
    if not seen:
        raise ValueError("No examples to score: `batches` is empty.")


def _cut(inputs: Mapping[str, Any], examples: slice) -> dict[str, Any]:
    """The given examples of every tensor that has them."""
    return {
        name: value[examples] if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in inputs.items()
    }
