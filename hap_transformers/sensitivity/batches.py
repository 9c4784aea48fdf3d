"""Numbers the batches for scoring, counts their examples, and cuts them to a number of examples."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device


# Inputs whose first dimension is always the examples.
EXAMPLES_FIRST = ("labels", "input_ids", "pixel_values", "inputs_embeds", "input_features")
# The label that losses of Transformers ignore.
IGNORED = -100


@dataclass
class ScoredBatch:
    """One batch of examples.

    Args:
        inputs (`dict[str, Any]`): The batch that the loss function gets.
        size (`int`): Number of examples.
        number (`int`): Position among the batches.
        first (`int`): Position of the batch's first example among all examples.
    """

    inputs: dict[str, Any]
    size: int
    number: int
    first: int

    def split(self, size: int) -> list["ScoredBatch"]:
        """Splits the examples into batches of at most `size`."""
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
        """Copies the batch to a device."""
        return ScoredBatch(send_to_device(self.inputs, device), self.size, self.number, self.first)


def scored_batches(batches: Iterable[Mapping[str, Any]], max_examples: int | None) -> Iterator[ScoredBatch]:
    """Numbers batches and stops after `max_examples` examples, cutting the last batch.

    Batches in which no label counts are skipped: their loss is undefined, and they weigh nothing in training either.

    Raises:
        ValueError: If there are no examples, or a batch is not a dictionary or has no tensors.
    """
    seen = 0
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(f"Batch {number} is a {type(batch).__name__}; give dictionaries of model inputs.")
        tensors = {name: v for name, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim}
        if not tensors:
            raise ValueError(f"Batch {number} has no tensors (its entries: {sorted(batch)}).")
        # Not every tensor has the examples in its first dimension.
        found = len(next((tensors[name] for name in EXAMPLES_FIRST if name in tensors), next(iter(tensors.values()))))
        size = found if max_examples is None else min(found, max_examples - seen)
        if size == 0:
            break
        cut = _cut(batch, found, slice(size))
        if not counts(cut):
            continue
        yield ScoredBatch(cut, size, number, seen)
        seen += size
    if not seen:
        raise ValueError("No examples to score: `batches` is empty, or no label in it counts (all are -100).")


def counts(batch: Mapping[str, Any]) -> bool:
    """Whether any label of a batch counts; a batch without labels counts.

    Labels of -100 do not count, nor do answers' positions beyond the text, as in the losses of Transformers.
    """
    ids = batch.get("input_ids")
    length = ids.shape[-1] if isinstance(ids, torch.Tensor) else None
    ignored = [bool((batch[name] == IGNORED).all()) for name in batch if _is_label(name, batch[name])]
    positions = [batch[name] for name in ("start_positions", "end_positions") if name in batch]
    if length is not None:
        ignored += [bool((position >= length).all()) for position in positions if isinstance(position, torch.Tensor)]
    return not ignored or not all(ignored)


def _is_label(name: str, value: Any) -> bool:
    return name.endswith(("label", "labels")) and isinstance(value, torch.Tensor)


def _cut(inputs: Mapping[str, Any], size: int, examples: slice) -> dict[str, Any]:
    """Selects examples of every tensor whose first dimension is `size`; other entries belong to all examples."""
    return {
        name: value[examples] if isinstance(value, torch.Tensor) and value.ndim and len(value) == size else value
        for name, value in inputs.items()
    }
