"""What it costs to set masks to zero, one after the other, if nothing makes up for it."""

import torch


def costs_without_refit(curvature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Sets masks to zero, the cheapest first.

    If the loss has the curvature F in the masks and no slope, setting the masks S to zero raises it by

        1/2 sum_{c, d in S} F_cd,

    so the mask c costs F_cc / 2 + sum_{d in S} F_cd after those in S (Kwon et al.,
    [arXiv 2204.09656](https://arxiv.org/abs/2204.09656)).

    Args:
        curvature (`torch.Tensor`): F, shape `(maps, masks, masks)`, for several maps with an order of their own each.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The masks in the order of removal, int64, and the additional cost of each
        removal, both of shape `(maps, masks)`.

    Example:
        >>> F = torch.tensor([[[2.0, 2.0, 0.0], [2.0, 3.0, 0.0], [0.0, 0.0, 6.0]]])
        >>> order, costs = costs_without_refit(F)
        >>> order.tolist(), costs.tolist()
        ([[0, 2, 1]], [[1.0, 3.0, 3.5]])
    """
    maps, masks = curvature.shape[:2]
    each = torch.arange(maps, device=curvature.device)
    costs = curvature.diagonal(dim1=1, dim2=2) / 2
    orders, steps = [], []
    for _ in range(masks):
        cheapest = costs.argmin(1)
        orders.append(cheapest)
        steps.append(costs[each, cheapest])
        costs = costs + curvature[each, cheapest]
        costs[each, cheapest] = torch.inf
    return torch.stack(orders, 1), torch.stack(steps, 1)
