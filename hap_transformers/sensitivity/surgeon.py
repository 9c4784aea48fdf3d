"""The optimal brain surgeon's cost: what removing inputs of a linear map costs when the others make up for it."""

import torch


# Removals whose updates are put off and then made at once, as products of matrices.
DELAYED = 128


def removal_costs(
    moment: torch.Tensor, curvature: torch.Tensor, size: int = 1, ridge: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Removes groups of inputs of a linear map one by one, each time the group that costs least.

    Let the map be W (outputs x inputs), the curvature of the loss in it C (x) A, with A the second moment of inputs
    and C that of output cotangents. Removing the inputs S and refitting the other columns optimally raises the loss by

        1/2 tr(M_SS P_SS^-1),    P = A^-1,    M = W^T C W

    (Hassibi and Stork, "Optimal Brain Surgeon", 1993; for Kronecker factors and groups of weights van der Ouderaa et
    al., [arXiv 2312.17244](https://arxiv.org/abs/2312.17244)). With R = P_SS^-1 P_S: the refit is W <- W - W_S R, so

        P <- P - R^T P_S:,    M <- M - R^T Q - Q^T R,    Q = M_S: - 1/2 M_SS R.

    Only the rows and the diagonal blocks that are looked at next are kept up to date; the rest follows after every
    `DELAYED` removals, so that nearly all work is in products of large matrices.

    Args:
        moment (`torch.Tensor`): A, float64, shape `(inputs, inputs)`.
        curvature (`torch.Tensor`): M, float64, shape `(inputs, inputs)`.
        size (`int`, *optional*, defaults to 1): Inputs in a group; groups are consecutive.
        ridge (`float`, *optional*, defaults to 0.01): What A's diagonal is raised by, in units of its mean.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The groups in the order of removal, int64, and what each removal costs on
        top of those before, float64, both of shape `(groups,)`.

    Example:
        >>> A, W = torch.eye(3).double(), torch.tensor([[3.0, 1.0, 2.0]]).double()
        >>> order, costs = removal_costs(A, W.T @ W, ridge=0.0)  # Independent inputs: half the squared weights.
        >>> order.tolist(), costs.tolist()
        ([1, 2, 0], [0.5, 2.0, 4.5])
    """
    scale = moment.diagonal().mean()
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    # Inputs that are all constant can be removed for nothing; the floor keeps the matrix invertible.
    inverse = torch.linalg.inv(moment + (ridge * scale + torch.finfo(moment.dtype).tiny ** 0.5) * identity)
    left = torch.arange(len(moment) // size)
    order, costs = [], []
    while len(left):
        batch = _Removals(inverse, curvature, size)
        for _ in range(min(max(DELAYED // size, 1), len(left))):
            group, cost = batch.remove_cheapest()
            order.append(int(left[group]))
            costs.append(cost)
        left = left[batch.left]
        inverse, curvature = batch.matrices()
    return torch.tensor(order, dtype=torch.long), torch.tensor(costs, dtype=torch.float64)


class _Removals:
    """Some removals, one after the other, from matrices that are themselves updated only at the end."""

    def __init__(self, inverse: torch.Tensor, curvature: torch.Tensor, size: int):
        self.inverse, self.curvature, self.size = inverse, curvature, size
        count = len(inverse) // size
        self.left = torch.ones(count, dtype=torch.bool)
        self.inverse_blocks, self.curvature_blocks = (
            matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
            for matrix in (inverse, curvature)
        )
        # R, P_S: and Q of the removals so far, one below the other.
        rows = max(DELAYED, size)
        self.R, self.P, self.Q = (inverse.new_empty(rows, len(inverse)) for _ in range(3))
        self.rows = 0

    def remove_cheapest(self) -> tuple[int, float]:
        """Removes the group that costs least; gives its position and its cost."""
        costs = self._costs()
        costs[~self.left] = torch.inf
        group = int(costs.argmin())
        own = slice(group * self.size, (group + 1) * self.size)
        R, P, Q = (stack[: self.rows] for stack in (self.R, self.P, self.Q))
        p = self.inverse[own] - R[:, own].T @ P
        m = self.curvature[own] - R[:, own].T @ Q - Q[:, own].T @ R
        r = p / p[:, own] if self.size == 1 else torch.linalg.solve(p[:, own], p)
        q = m - m[:, own] @ r / 2
        new = slice(self.rows, self.rows + self.size)
        self.R[new], self.P[new], self.Q[new] = r, p, q
        self.rows += self.size
        r_blocks, p_blocks, q_blocks = (rows.view(self.size, -1, self.size).transpose(0, 1) for rows in (r, p, q))
        self.inverse_blocks -= r_blocks.mT @ p_blocks
        change = r_blocks.mT @ q_blocks
        self.curvature_blocks -= change + change.mT
        self.left[group] = False
        self.inverse_blocks[group] = torch.eye(self.size, dtype=p.dtype, device=p.device)
        return group, float(costs[group])

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse and curvature of the inputs that are left."""
        kept = self.left.repeat_interleave(self.size)
        R, P, Q = (stack[: self.rows, kept] for stack in (self.R, self.P, self.Q))
        change = R.T @ Q
        curvature = self.curvature[kept][:, kept] - change - change.T
        return self.inverse[kept][:, kept] - R.T @ P, curvature

    def _costs(self) -> torch.Tensor:
        if self.size == 1:
            return (self.curvature_blocks / self.inverse_blocks).flatten() / 2
        solved = torch.linalg.solve(self.inverse_blocks, self.curvature_blocks)
        return solved.diagonal(dim1=1, dim2=2).sum(1) / 2
