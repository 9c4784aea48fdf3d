"""Random signs."""

import torch


def rademacher(shape: torch.Size | tuple[int, ...], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers from {-1, 1} alike, of a tensor's type and on its device, where `generator` must be, too."""
    drawn = torch.randint(0, 2, shape, generator=generator, device=like.device, dtype=torch.int8)
    return drawn.to(like.dtype).mul_(2).sub_(1)
