"""The windows of an image in which an attention module such as Swin's sees its tokens."""

from collections.abc import Sequence
from typing import Any

import torch


def out_of_windows(layer: Any, windows: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Arranges tokens that a layer's attention sees as the residual stream has them, without padding.

    Args:
        layer (`nn.Module`): The layer, with its `window_size`, and the `shift_size` by which it shifts images.
        windows (`torch.Tensor`): Shape `(images * windows, window_size ** 2, features)`.
        size (`Sequence[int]`): Height and width of the images, in tokens.

    Returns:
        `torch.Tensor`: Shape `(images, height * width, features)`.
    """
    (height, width), side, shift = size, int(layer.window_size), int(layer.shift_size)
    down, across = -(-height // side), -(-width // side)
    images = len(windows) // (down * across)
    image = windows.reshape(images, down, across, side, side, windows.shape[-1]).transpose(2, 3)
    image = image.flatten(3, 4).flatten(1, 2).roll((shift, shift), (1, 2))
    return image[:, :height, :width].flatten(1, 2)
