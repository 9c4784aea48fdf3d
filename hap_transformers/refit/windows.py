"""The windows of an image in which an attention module such as Swin's sees its tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F


def in_windows(layer: Any, tokens: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Arranges the tokens of images as a layer gives them to its attention.

    Images are padded to multiples of the window with zeros, and shifted in layers that do so.

    Args:
        layer (`nn.Module`): The layer, with its `window_size` and `shift_size`.
        tokens (`torch.Tensor`): Shape `(images, height * width, features)`.
        size (`Sequence[int]`): Height and width.

    Returns:
        `torch.Tensor`: Shape `(images * windows, window_size ** 2, features)`.
    """
    side, shift = int(layer.window_size), int(layer.shift_size)
    image = tokens.unflatten(1, tuple(size))
    image = F.pad(image, (0, 0, 0, -image.shape[2] % side, 0, -image.shape[1] % side)).roll((-shift, -shift), (1, 2))
    windows = image.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return windows.reshape(-1, side * side, tokens.shape[-1])
