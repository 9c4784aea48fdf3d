"""Selects the tokens that are not padding, and sums over them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


# Features per block of a symmetric product, of which `products` computes about (1 + BLOCK / features) / 2. Small
# blocks skip more of the part below the diagonal, large blocks keep the matrix products efficient.
BLOCK = 192
# The label that losses of Transformers ignore.
IGNORED = -100


def valid_tokens(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Selects the features of the tokens that an attention mask does not exclude.

    Args:
        features (`torch.Tensor`): Shape `(batch, tokens, features)`, or `(batch * tokens, features)` of a model that
            flattens its tokens.
        mask (`torch.Tensor`, *optional*): Shape `(batch, tokens)`, zero for padding, or `(examples, choices, tokens)`
            where the model runs each choice as an example. A mask of another shape is ignored, and all tokens count;
            this happens, for example, if the model shortens the sequence.

    Returns:
        `torch.Tensor`: Shape `(valid tokens, features)`.
    """
    if mask is not None and mask.ndim == 3:
        mask = mask.flatten(0, 1)
    if mask is not None and features.ndim == 2:
        mask = mask.flatten()
    if mask is not None and mask.shape == features.shape[:-1]:
        return features[mask.bool()]
    return features.flatten(0, -2)


def whole_calls(calls: Sequence[torch.Tensor], mask: torch.Tensor | None, chunk: int) -> list[torch.Tensor]:
    """Joins the calls of a module that runs its tokens in chunks, so that a mask fits them.

    Args:
        calls (`Sequence[torch.Tensor]`): Features of each call, shape `(batch, tokens, features)`.
        mask (`torch.Tensor`, *optional*): The mask of all tokens.
        chunk (`int`): Tokens of a chunk (`chunk_size_feed_forward`); 0 if the model makes none.

    Returns:
        `list[torch.Tensor]`: Features of all tokens, once for each layer that has the module. Calls of other lengths
            than that of a chunk are left as they are.
    """
    if mask is None or not chunk or any(call.shape[1] != chunk for call in calls):
        return list(calls)
    count = max(mask.shape[-1] // chunk, 1)
    return [torch.cat(list(calls[i : i + count]), 1) for i in range(0, len(calls), count)]


def relative_distance(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared distance from a target, divided by the target's mean square unless that is zero.

    Args:
        states (`torch.Tensor`): Shape `(tokens, features)`. Without tokens the distance is 0.
        target (`torch.Tensor`): Of the same shape.
    """
    if not states.numel():
        return states.sum()
    size = target.square().mean()
    return (states - target).square().mean() / torch.where(size > 0, size, 1.0)


def mask_of(inputs: Mapping[str, Any], decoded: bool = False) -> torch.Tensor | None:
    """The mask of a batch's tokens, for [`valid_tokens`]; `None` if all count.

    Args:
        inputs (`Mapping[str, Any]`): The batch.
        decoded (`bool`, *optional*, defaults to `False`): Whether tokens are those that an encoder-decoder decodes.
            Without a mask of their own, those count whose label does. Without decoder inputs and labels, the model
            decodes what the encoder reads.
    """
    if not decoded:
        return inputs.get("attention_mask")
    own, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    if own is not None:
        return own
    if isinstance(labels, torch.Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return counted(labels)
    return None if "decoder_input_ids" in inputs else inputs.get("attention_mask")


def counted(labels: torch.Tensor) -> torch.Tensor:
    """Which labels count: -100 does not, unless labels are targets of a regression, which may have any value."""
    return torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED


def has_tokens(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch has anything but padding."""
    mask = mask_of(inputs)
    return not isinstance(mask, torch.Tensor) or bool(mask.any())


def device_of_sums(device: torch.device) -> torch.device:
    """The device for sums in float64: the given one, but for Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def products(tokens: torch.Tensor) -> torch.Tensor:
    """Computes the products of all pairs of features, summed over tokens.

    The result is symmetric. On a processor only the blocks on and above the diagonal are computed, the others are
    copied. Accelerators are faster with one large product.

    Args:
        tokens (`torch.Tensor`): Shape `(tokens, features)`.

    Returns:
        `torch.Tensor`: Shape `(features, features)`.
    """
    if tokens.device.type != "cpu":
        return tokens.T @ tokens
    features = tokens.shape[1]
    result = tokens.new_empty(features, features)
    for start in range(0, features, BLOCK):
        stop = min(start + BLOCK, features)
        result[start:stop, start:] = tokens[:, start:stop].T @ tokens[:, start:]
        result[stop:, start:stop] = result[start:stop, stop:].T
    return result


def with_length(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Repeats or cuts the text inputs of one example to a number of tokens; other inputs stay unchanged."""
    if "input_ids" not in inputs:
        return dict(inputs)
    ids = inputs["input_ids"]
    last, before = ids.ndim - 1, ids.shape[-1]  # Multiple-choice inputs have choices before tokens.
    index = torch.arange(length, device=ids.device) % before
    return {
        name: value.index_select(last, index)
        if isinstance(value, torch.Tensor) and value.shape[last : last + 1] == (before,)
        else value
        for name, value in inputs.items()
    }


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model's table of position embeddings has room for; `None` if it has no such table."""
    found = []
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "embed_positions", "wpe")) and isinstance(module, nn.Embedding):
            # RoBERTa-like models number positions from after the one of padding, BART from an offset.
            first = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - first)
    return min(found, default=None)


def validate_length(model: PreTrainedModel, length: int) -> None:
    """Checks that a model with a table of position embeddings has enough positions for texts of a length.

    Raises:
        ValueError: If the table has fewer positions.
    """
    limit = positions(model)
    if limit is not None and length > limit:
        raise ValueError(f"{type(model).__name__} takes at most {limit} tokens, not {length}.")
