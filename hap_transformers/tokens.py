"""Tokens that count, all but padding, and sums over them."""

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
