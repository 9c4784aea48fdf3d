"""Draws random signs."""

import torch


def rademacher(shape: torch.Size | tuple[int, ...], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws -1 and 1 with equal probability.

    Args:
        shape (`torch.Size`): Shape of the result.
        like (`torch.Tensor`): A tensor of the result's dtype and device.
        generator (`torch.Generator`): Source of the signs, on the same device.
    """
    drawn = torch.randint(0, 2, shape, generator=generator, device=like.device, dtype=torch.int8)
    return drawn.to(like.dtype).mul_(2).sub_(1)
