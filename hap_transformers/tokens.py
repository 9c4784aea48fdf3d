"""Tokens that count: all but padding."""

import torch


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
