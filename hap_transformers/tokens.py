"""Tokens that count, all but padding, and sums over them."""

from collections.abc import Mapping
from typing import Any

import torch


# Features in a block of a product that is computed only above the diagonal.
BLOCK = 192


def valid_tokens(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The features of the tokens that an attention mask does not exclude.

    Args:
        features (`torch.Tensor`): Shape `(batch, tokens, features)`.
        mask (`torch.Tensor`, *optional*): Shape `(batch, tokens)`, zero for padding. A mask of another shape (that of
            a sequence which the model shortens, say) is passed over, and all tokens count.

    Returns:
        `torch.Tensor`: Shape `(valid tokens, features)`.
    """
    if mask is not None and mask.shape == features.shape[:-1]:
        return features[mask.bool()]
    return features.flatten(0, -2)


def products(tokens: torch.Tensor) -> torch.Tensor:
    """Products of all pairs of features, summed over tokens; only those above the diagonal are computed.

    Args:
        tokens (`torch.Tensor`): Shape `(tokens, features)`.

    Returns:
        `torch.Tensor`: Shape `(features, features)`.
    """
    features = tokens.shape[1]
    result = tokens.new_empty(features, features)
    for start in range(0, features, BLOCK):
        stop = min(start + BLOCK, features)
        result[start:stop, start:] = tokens[:, start:stop].T @ tokens[:, start:]
        result[stop:, start:stop] = result[start:stop, stop:].T
    return result


def with_length(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Text inputs of one example repeated or cut to a number of tokens; others as they are."""
    if "input_ids" not in inputs:
        return dict(inputs)
    before = inputs["input_ids"].shape[1]
    index = torch.arange(length, device=inputs["input_ids"].device) % before
    return {
        name: value[:, index] if isinstance(value, torch.Tensor) and value.shape[1:2] == (before,) else value
        for name, value in inputs.items()
    }
