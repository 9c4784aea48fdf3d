"""The optimal brain surgeon: computes what removals of a linear map's inputs cost if the other inputs are refitted."""

import torch


# Removed inputs per update of the full matrices. Many make the update an efficient product of large matrices. Few keep
# the corrections short that each removal needs because of the pending removals.
DELAYED = 128


def removal_costs(
    moment: torch.Tensor, curvature: torch.Tensor, size: int = 1, ridge: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Removes groups of inputs of a linear map one by one, the cheapest group first.

    Let the map be W (outputs x inputs). Let the curvature of the loss in W be C (x) A, where A is the second moment of
    the inputs and C that of the output cotangents. Removing the inputs S and refitting the other columns optimally
    raises the loss by

        1/2 tr(M_SS P_SS^-1),    P = A^-1,    M = W^T C W

    (Hassibi and Stork, "Optimal Brain Surgeon", 1993; for Kronecker factors and groups of weights van der Ouderaa et
    al., [arXiv 2312.17244](https://arxiv.org/abs/2312.17244)). With R = P_SS^-1 P_S: the refit is
    W <- W - W_S R, so

        P <- P - R^T P_S:,    M <- M - R^T Q - Q^T R,    Q = M_S: - 1/2 M_SS R.

    Each removal updates only the diagonal blocks, and computes the current rows of the removed group. The full
    matrices are updated after `DELAYED` removed inputs, so nearly all work is in products of large matrices.

    Args:
        moment (`torch.Tensor`): A, float64, shape `(inputs, inputs)`.
        curvature (`torch.Tensor`): M, float64, shape `(inputs, inputs)`.
        size (`int`, *optional*, defaults to 1): Inputs per group. The inputs of a group are consecutive.
        ridge (`float`, *optional*, defaults to 0.01): Number added to A's diagonal, in units of the diagonal's mean.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The groups in the order of removal, int64, and the additional cost of each
        removal, float64, both of shape `(groups,)`.

    Example:
        >>> A, W = torch.eye(3).double(), torch.tensor([[3.0, 1.0, 2.0]]).double()
        >>> order, costs = removal_costs(A, W.T @ W, ridge=0.0)  # Independent inputs: half the squared weights.
        >>> order.tolist(), costs.tolist()
        ([1, 2, 0], [0.5, 2.0, 4.5])
    """
    scale = moment.diagonal().mean()
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    # If all inputs are constant, the scale is zero and removal is free. The small number keeps the matrix invertible.
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
    """A series of removals whose updates are stored as R, P and Q.

    The diagonal blocks are updated at each removal, the full matrices only by `matrices`.
    """

    def __init__(self, inverse: torch.Tensor, curvature: torch.Tensor, size: int):
        self.inverse, self.curvature, self.size = inverse, curvature, size
        count = len(inverse) // size
        self.left = torch.ones(count, dtype=torch.bool)
        self.inverse_blocks, self.curvature_blocks = (
            matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
            for matrix in (inverse, curvature)
        )
        # Rows R, P_S: and Q of the removals so far.
        rows = max(DELAYED, size)
        self.R, self.P, self.Q = (inverse.new_empty(rows, len(inverse)) for _ in range(3))
        self.rows = 0

    def remove_cheapest(self) -> tuple[int, float]:
        """Removes the cheapest group. Returns its position and its cost."""
        costs = self._costs()
        costs[~self.left] = torch.inf
        group = int(costs.argmin())
        removed = slice(group * self.size, (group + 1) * self.size)
        R, P, Q = (stack[: self.rows] for stack in (self.R, self.P, self.Q))
        p = self.inverse[removed] - R[:, removed].T @ P
        m = self.curvature[removed] - R[:, removed].T @ Q - Q[:, removed].T @ R
        r = p / p[:, removed] if self.size == 1 else _solve(p[:, removed], p)
        q = m - m[:, removed] @ r / 2
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
        """Computes inverse and curvature of the remaining inputs."""
        kept = self.left.repeat_interleave(self.size)
        R, P, Q = (stack[: self.rows, kept] for stack in (self.R, self.P, self.Q))
        change = R.T @ Q
        curvature = self.curvature[kept][:, kept] - change - change.T
        return self.inverse[kept][:, kept] - R.T @ P, curvature

    def _costs(self) -> torch.Tensor:
        if self.size == 1:
            return (self.curvature_blocks / self.inverse_blocks).flatten() / 2
        solved = _solve(self.inverse_blocks, self.curvature_blocks)
        return solved.diagonal(dim1=1, dim2=2).sum(1) / 2


def _solve(blocks: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solves with symmetric positive definite blocks, by Cholesky factors.

    `torch.linalg.solve` never returns for a batch of blocks wider than 128 in torch's CPU builds with several threads.
    """
    factors, failed = torch.linalg.cholesky_ex(blocks)
    if failed.any():  # Rounding has made a block indefinite; single matrices can be solved otherwise.
        if blocks.ndim == 2:
            return torch.linalg.solve(blocks, right)
        return torch.stack([torch.linalg.solve(block, part) for block, part in zip(blocks, right, strict=True)])
    return torch.cholesky_solve(right, factors)
