"""The optimal brain surgeon: computes what removals of a linear map's inputs cost if the other inputs are refitted."""

import torch


# Removed inputs per update of the full matrices. Many make the update an efficient product of large matrices. Few keep
# the corrections short that each removal needs because of the pending removals.
DELAYED = 128
# The cheapest 1 / ONE_IN of the groups that are left go at once, at least one; so narrow maps are done one by one. A
# step costs about the same for any number. `benchmarks/elimination.py` measures what this changes.
ONE_IN = 128


def removal_costs(
    moment: torch.Tensor, curvature: torch.Tensor, size: int = 1, ridge: float = 0.01, by_input: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Removes groups of inputs of a linear map, the cheapest groups first.

    Let the map be W (outputs x inputs). Let the curvature of the loss in W be C (x) A, where A is the second moment of
    the inputs and C that of the output cotangents. Removing the inputs S and refitting the other columns optimally
    raises the loss by

        1/2 tr(M_SS P_SS^-1),    P = A^-1,    M = W^T C W

    (Hassibi and Stork, "Optimal Brain Surgeon", 1993; for Kronecker factors and groups of weights van der Ouderaa et
    al., [arXiv 2312.17244](https://arxiv.org/abs/2312.17244)). With R = P_SS^-1 P_S: the refit is
    W <- W - W_S R, so

        P <- P - R^T P_S:,    M <- M - R^T Q - Q^T R,    Q = M_S: - 1/2 M_SS R.

    Each step removes the cheapest 1 / `ONE_IN` of the groups, at least one. It computes the current rows of the
    removed groups, and updates only the diagonal blocks. The full matrices are updated after `DELAYED` removed inputs,
    so nearly all work is in products of large matrices. All of it runs on the tensors' device; nothing waits for the
    host between steps. The costs are exact for the order that is returned: with P_SS = L L^T, those of the groups of a
    step are half the traces of the diagonal blocks of L^-1 M_SS L^-T.

    Args:
        moment (`torch.Tensor`): A, float64, shape `(inputs, inputs)`, or `(maps, inputs, inputs)` for several maps,
            each with an order of its own.
        curvature (`torch.Tensor`): M, float64, of the same shape.
        size (`int`, *optional*, defaults to 1): Inputs per group. The inputs of a group are consecutive.
        ridge (`float`, *optional*, defaults to 0.01): Number added to A's diagonal, in units of the diagonal's mean.
        by_input (`bool`, *optional*, defaults to `False`): Whether the unit is each input's own entry of the diagonal.
            Where a few inputs are a thousand times larger than others, as those that make the attention sinks of
            language models, the mean says nothing of the others.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The groups in the order of removal, int64, and the additional cost of each
        removal, float64, both of shape `(groups,)` or `(maps, groups)`.

    Example:
        >>> A, W = torch.eye(3).double(), torch.tensor([[3.0, 1.0, 2.0]]).double()
        >>> order, costs = removal_costs(A, W.T @ W, ridge=0.0)  # Independent inputs: half the squared weights.
        >>> order.tolist(), costs.tolist()
        ([1, 2, 0], [0.5, 2.0, 4.5])
    """
    if moment.ndim == 2:
        order, costs = removal_costs(moment[None], curvature[None], size, ridge, by_input)
        return order[0], costs[0]
    own = moment.diagonal(dim1=1, dim2=2)
    scale = own if by_input else own.mean(1, keepdim=True).expand_as(own)
    # If all inputs are constant, the scale is zero and removal is free. The small number keeps the matrix invertible.
    added = ridge * scale + torch.finfo(moment.dtype).tiny ** 0.5
    inverse = _inverse(moment + torch.diag_embed(added))
    return _eliminate(inverse, curvature.clone(), size)


def elimination_bytes(inputs: int) -> int:
    """Bytes that [`removal_costs`] takes for one map, its arguments included: six matrices in float64."""
    return 6 * 8 * inputs**2


def _eliminate(inverse: torch.Tensor, curvature: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Removes all groups; both matrices are overwritten."""
    maps, inputs = inverse.shape[:2]
    left = inputs // size
    numbers = torch.arange(left, device=inverse.device).repeat(maps, 1)
    orders, costs = [], []
    while left:
        removals = _Removals(inverse, curvature, size)
        count = min(max(DELAYED // size, 1), left)
        at_once = max(left // ONE_IN, 1)
        for done in range(0, count, at_once):
            removals.remove_cheapest(min(at_once, count - done))
        removed = torch.cat(removals.groups, 1)
        orders.append(numbers.gather(1, removed))
        costs.append(torch.cat(removals.costs, 1))
        left -= count
        # The last groups that stay move to the places of removed ones, so that what stays comes first.
        holes, last = removed.sort(1).values, torch.arange(left, left + count, device=inverse.device)
        stays_last = removals.gone[:, last].to(torch.int8).argsort(dim=1, stable=True)
        moved = last[stays_last]
        numbers = numbers.scatter(1, holes, numbers.gather(1, moved))[:, :left]
        inverse, curvature = removals.matrices(holes, moved, left * size)
    return torch.cat(orders, 1), torch.cat(costs, 1)


class _Removals:
    """A series of removals from several maps whose updates are stored as R, P and Q.

    The diagonal blocks are updated at each removal, the full matrices only by `matrices`.

    Args:
        inverse (`torch.Tensor`): P, shape `(maps, inputs, inputs)`.
        curvature (`torch.Tensor`): M, of the same shape.
        size (`int`): Inputs per group.
    """

    def __init__(self, inverse: torch.Tensor, curvature: torch.Tensor, size: int):
        self.inverse, self.curvature, self.size = inverse, curvature, size
        maps, inputs = inverse.shape[:2]
        self.map = torch.arange(maps, device=inverse.device)
        self.gone = torch.zeros(maps, inputs // size, dtype=torch.bool, device=inverse.device)
        self.inverse_blocks, self.curvature_blocks = (_diagonal_blocks(m, size) for m in (inverse, curvature))
        self.identity = torch.eye(size, dtype=inverse.dtype, device=inverse.device)
        # Rows R, P_S: and Q of the removals so far.
        self.R, self.P, self.Q = (inverse.new_empty(maps, max(DELAYED, size), inputs) for _ in range(3))
        self.rows = 0
        self.groups: list[torch.Tensor] = []
        self.costs: list[torch.Tensor] = []

    def remove_cheapest(self, count: int) -> None:
        """Removes the cheapest groups of every map, so many at once."""
        costs = _solve(self.inverse_blocks, self.curvature_blocks).diagonal(dim1=2, dim2=3).sum(2)
        groups = costs.masked_fill_(self.gone, torch.inf).topk(count, largest=False).indices
        removed = self._inputs_of(groups)
        R, P, Q = (stack[:, : self.rows] for stack in (self.R, self.P, self.Q))
        r_removed, q_removed = (_columns(rows, removed).mT for rows in (R, Q))
        p = _rows(self.inverse, removed).baddbmm_(r_removed, P, alpha=-1)
        m = _rows(self.curvature, removed).baddbmm_(r_removed, Q, alpha=-1).baddbmm_(q_removed, R, alpha=-1)
        p_removed, m_removed = _columns(p, removed), _columns(m, removed)
        r = _solve(p_removed, p)
        q = torch.baddbmm(m, m_removed, r, alpha=-0.5)
        self.groups.append(groups)
        self.costs.append(_costs_in_order(p_removed, m_removed, self.size))
        new = slice(self.rows, self.rows + removed.shape[1])
        self.R[:, new], self.P[:, new], self.Q[:, new] = r, p, q
        self.rows = new.stop
        self.inverse_blocks -= self._blocks(r, p)
        change = self._blocks(r, q)
        self.curvature_blocks -= change + change.mT
        self.gone[self.map[:, None], groups] = True
        self.inverse_blocks[self.map[:, None], groups] = self.identity

    def matrices(self, holes: torch.Tensor, moved: torch.Tensor, left: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Updates inverse and curvature, and returns the parts of the remaining inputs.

        Args:
            holes (`torch.Tensor`): Positions of the removed groups, shape `(maps, removed)`.
            moved (`torch.Tensor`): Positions of the groups that move there, of the same shape. Some are behind the
                remaining inputs before and after.
            left (`int`): Number of remaining inputs.
        """
        one, holes, moved = self.map[:, None], self._inputs_of(holes), self._inputs_of(moved)
        for stack in (self.R, self.P, self.Q, self.inverse, self.curvature):
            stack[one, :, holes] = stack[one, :, moved]
        for matrix in (self.inverse, self.curvature):
            matrix[one, holes] = matrix[one, moved]
        inverse, curvature = (matrix[:, :left, :left] for matrix in (self.inverse, self.curvature))
        R, P, Q = (stack[:, : self.rows, :left] for stack in (self.R, self.P, self.Q))
        for i in range(len(inverse)):  # Views of a batch are not updated in place by one product.
            inverse[i].addmm_(R[i].T, P[i], alpha=-1)
            curvature[i].addmm_(R[i].T, Q[i], alpha=-1).addmm_(Q[i].T, R[i], alpha=-1)
        return inverse, curvature

    def _inputs_of(self, groups: torch.Tensor) -> torch.Tensor:
        """Positions of the inputs of groups, shape `(maps, groups * size)`."""
        inputs = groups[:, :, None] * self.size + torch.arange(self.size, device=groups.device)
        return inputs.flatten(1)

    def _blocks(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Products first_g^T second_g of the columns of every group, shape `(maps, groups, size, size)`."""
        if self.size == 1:
            return (first * second).sum(1)[..., None, None]
        first, second = (rows.unflatten(2, (-1, self.size)).transpose(1, 2) for rows in (first, second))
        return first.mT @ second


def _rows(matrices: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Selects rows of every matrix; `index` has the shape `(maps, rows)`."""
    return matrices.gather(1, index[:, :, None].expand(-1, -1, matrices.shape[2]))


def _columns(matrices: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Selects columns of every matrix; `index` has the shape `(maps, columns)`."""
    return matrices.gather(2, index[:, None].expand(-1, matrices.shape[1], -1))


def _diagonal_blocks(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Shape `(maps, groups, size, size)`."""
    blocks = matrix.unflatten(1, (-1, size)).unflatten(3, (-1, size))
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).clone()


def _solve(blocks: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Solves with symmetric positive definite blocks, by Cholesky factors.

    `torch.linalg.solve` never returns for a batch of blocks wider than 128 in torch's CPU builds with several threads.
    """
    if blocks.shape[-1] == 1:
        return right / blocks
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(blocks).L)


def _costs_in_order(inverse: torch.Tensor, curvature: torch.Tensor, size: int) -> torch.Tensor:
    """Costs of removing groups one after the other, shape `(maps, groups)`, from P_SS and M_SS of all of them."""
    if inverse.shape[1] == 1:
        return (curvature / inverse / 2).flatten(1)
    factor = torch.linalg.cholesky_ex(inverse).L
    half = torch.linalg.solve_triangular(factor, curvature, upper=False)
    whole = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    return whole.diagonal(dim1=1, dim2=2).unflatten(1, (-1, size)).sum(2) / 2


def _inverse(matrices: torch.Tensor) -> torch.Tensor:
    """Inverts symmetric matrices. The results' rows are contiguous, which makes it cheap to select some."""
    factors, failed = torch.linalg.cholesky_ex(matrices, upper=True)
    if failed.any():  # Without a ridge inputs may depend on each other; single matrices can be inverted otherwise.
        return torch.stack([torch.linalg.inv(matrix) for matrix in matrices])
    return torch.cholesky_inverse(factors, upper=True).mT
