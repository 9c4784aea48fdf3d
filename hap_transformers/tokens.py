"""Tokens that count, all but padding, and sums over them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


# Features in a block of a product that is computed only above the diagonal.
BLOCK = 192


def valid_tokens(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The features of the tokens that an attention mask does not exclude.

    Args:
        features (`torch.Tensor`): Shape `(batch, tokens, features)`.
        mask (`torch.Tensor`, *optional*): Shape `(batch, tokens)`, zero for padding, or `(examples, choices, tokens)`
            where the model takes each choice for an example. A mask of another shape (that of a sequence which the
            model shortens, say) is passed over, and all tokens count.

    Returns:
        `torch.Tensor`: Shape `(valid tokens, features)`.
    """
    if mask is not None and mask.ndim == 3:
        mask = mask.flatten(0, 1)
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
    ids = inputs["input_ids"]
    last, before = ids.ndim - 1, ids.shape[-1]  # Before the tokens there may be choices.
    index = torch.arange(length, device=ids.device) % before
    return {
        name: value.index_select(last, index)
        if isinstance(value, torch.Tensor) and value.shape[last : last + 1] == (before,)
        else value
        for name, value in inputs.items()
    }


def validate_length(model: PreTrainedModel, length: int) -> None:
    """Refuses texts for which a model has too few positions, where it looks them up in a table.

    Raises:
        ValueError: If the model takes fewer tokens.
    """
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "embed_positions", "wpe")) and isinstance(module, nn.Embedding):
            # RoBERTa and its like count from behind the position of padding, BART from an offset.
            first = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            if length > module.num_embeddings - first:
                raise ValueError(
                    f"{type(model).__name__} takes at most {module.num_embeddings - first} tokens, not {length}."
                )
