"""Numbers the batches for scoring, counts their examples, and cuts them to a number of examples."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from ..tokens import counted, has_tokens


# Inputs whose first dimension is always the examples.
EXAMPLES_FIRST = ("labels", "input_ids", "pixel_values", "inputs_embeds", "input_features")


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


def scored_batches(
    batches: Iterable[Mapping[str, Any]], max_examples: int | None, shifted: bool = False
) -> Iterator[ScoredBatch]:
    """Numbers batches and stops after `max_examples` examples, cutting the last batch.

    Batches without examples are skipped, those in which no label counts, whose loss is undefined and which weigh
    nothing in training either, and those whose mask excludes all tokens.

    Args:
        batches (`Iterable[Mapping[str, Any]]`): The batches.
        max_examples (`int`, *optional*): Number of examples; by default all.
        shifted (`bool`, *optional*, defaults to `False`): As for [`counts`].

    Raises:
        ValueError: If there are no examples, or a batch is not a dictionary or has no tensors.
    """
    seen = 0
    for number, batch in enumerate(batches):
        if seen == max_examples:
            break
        found = examples_in(batch, number)
        size = found if max_examples is None else min(found, max_examples - seen)
        cut = _cut(batch, found, slice(size))
        if not size or not counts(cut, shifted) or not has_tokens(cut):
            continue
        yield ScoredBatch(cut, size, number, seen)
        seen += size
    if not seen:
        raise ValueError(
            "No examples to score: `batches` is empty (a generator can be read only once), no label in it counts (all "
            "are -100), or its masks exclude all tokens."
        )


def examples_in(batch: Mapping[str, Any], number: int) -> int:
    """Number of examples of a batch.

    Raises:
        ValueError: If it is no dictionary or has no tensors.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(f"Batch {number} is a {type(batch).__name__}; give dictionaries of model inputs.")
    tensors = {name: v for name, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim}
    if not tensors:
        raise ValueError(f"Batch {number} has no tensors (its entries: {sorted(batch)}).")
    # Not every tensor has the examples in its first dimension.
    return len(next((tensors[name] for name in EXAMPLES_FIRST if name in tensors), next(iter(tensors.values()))))


def shifts_labels(model: PreTrainedModel) -> bool:
    """Whether a model's logits at a position predict the label of the next one, as in causal language models."""
    return model.can_generate() and not model.config.is_encoder_decoder


def counts(batch: Mapping[str, Any], shifted: bool = False) -> bool:
    """Whether any label of a batch counts; a batch without labels counts.

    Labels of -100 do not count, if they are whole numbers, nor do answers' positions beyond the text, as in the losses
    of Transformers. An answer's loss is defined only if a start and an end count.

    Args:
        batch (`Mapping[str, Any]`): The batch.
        shifted (`bool`, *optional*, defaults to `False`): Whether the first label of a text does not count, because no
            position predicts it (see [`shifts_labels`]).
    """
    ids = batch.get("input_ids")
    shape = ids.shape if isinstance(ids, torch.Tensor) else None
    labels = [value for name, value in batch.items() if _is_label(name, value)]
    if shifted:
        labels = [value[..., 1:] if value.shape == shape else value for value in labels]
    positions = [batch[name] for name in ("start_positions", "end_positions") if name in batch]
    beyond = [bool((p >= shape[-1]).all()) for p in positions if shape is not None and isinstance(p, torch.Tensor)]
    return not any(beyond) and (not labels or any(bool(counted(value).any()) for value in labels))


def _is_label(name: str, value: Any) -> bool:
    return name.endswith(("label", "labels")) and isinstance(value, torch.Tensor)


def _cut(inputs: Mapping[str, Any], size: int, examples: slice) -> dict[str, Any]:
    """Selects examples of every tensor whose first dimension is `size`; other entries belong to all examples."""
    return {
        name: value[examples] if isinstance(value, torch.Tensor) and value.ndim and len(value) == size else value
        for name, value in inputs.items()
    }
