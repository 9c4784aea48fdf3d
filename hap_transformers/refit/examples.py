"""How much data a refit reads."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from ..sensitivity.batches import scored_batches


# Tokens beyond which no further examples are read: as many as 1,024 texts of 128 tokens have.
TOKENS = 1024 * 128
# Tokens of an image, about as many as models make of 224 x 224 pixels.
TOKENS_OF_AN_IMAGE = 256


def refit_batches(
    batches: Iterable[Mapping[str, Any]], most: int, least: int, shifted: bool = False
) -> Iterator[dict[str, Any]]:
    """Cuts batches to as many examples as a refit shall read, one batch at a time.

    More examples lower the noise of the least squares, and every token costs the same. So short texts may be more than
    long ones.

    Args:
        batches (`Iterable[Mapping[str, Any]]`): Batches of model inputs.
        most (`int`): Number of examples to read at most.
        least (`int`): Number of examples to read whatever their length. More are read up to 131,072 tokens in all.
        shifted (`bool`, *optional*, defaults to `False`): As for
            [`counts`][hap_transformers.sensitivity.batches.counts].

    Raises:
        ValueError: If there are no examples, or a batch is not a dictionary or has no tensors.
    """
    tokens = 0
    for batch in scored_batches(batches, most, shifted):
        tokens += _tokens(batch.inputs, batch.size)
        if tokens > TOKENS and batch.first >= least:
            return
        yield batch.inputs


def _tokens(inputs: Mapping[str, Any], size: int) -> int:
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if isinstance(mask, torch.Tensor):
        return int(mask.sum())
    return ids.numel() if isinstance(ids, torch.Tensor) else TOKENS_OF_AN_IMAGE * size
