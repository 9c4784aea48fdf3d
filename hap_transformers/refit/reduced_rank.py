"""The low-rank map that explains most of what other features miss."""

import torch
from torch import nn

from .ridge import solve_ridge


def reduced_rank_regression(xx: torch.Tensor, xy: torch.Tensor, rank: int, given: int, ridge: float) -> torch.Tensor:
    r"""The linear map of some rank that, beside given features, explains most of a target.

    Minimizes || Y - X W^T - Z A^T B^T ||^2 over W, B and A of `rank` rows. With X projected out of Z and Y, the full
    regression is M = (Z^T Z)^-1 Z^T Y; with R R^T = Z^T Z and the right singular vectors V of R^T M, the best B is V
    and A is (M V)^T (Izenman, "Reduced-rank regression for the multivariate linear model", 1975).

    Args:
        xx (`torch.Tensor`): Products of the features (X, Z) over all tokens, shape `(features, features)`.
        xy (`torch.Tensor`): Their products with the target, shape `(features, outputs)`.
        rank (`int`): Rank of the map.
        given (`int`): Number of features in X, the first ones.
        ridge (`float`): What the diagonals of X's and of Z's part are raised by, in units of their mean.

    Returns:
        `torch.Tensor`: A, shape `(rank, features - given)`, each row scaled so that its feature has the mean variance
        of X's features.
    """
    means = [part.mean() for part in xx.diagonal().split([given, len(xx) - given])]
    xx = xx + ridge * torch.diag(torch.cat([means[0].expand(given), means[1].expand(len(xx) - given)]))
    inner, outer = xx[:given, :given], xx[:given, given:]
    solved = solve_ridge(inner, torch.cat([outer, xy[:given]], 1), 0.0)
    zz = xx[given:, given:] - outer.T @ solved[:, : outer.shape[1]]
    zy = xy[given:] - outer.T @ solved[:, outer.shape[1] :]
    # R by eigenvectors, as features may depend on each other.
    values, vectors = torch.linalg.eigh(zz)
    used = values > 1e-12 * values.max()
    roots, vectors = values[used].sqrt()[:, None], vectors[:, used]
    whitened = vectors.T @ zy / roots
    _, _, right = torch.linalg.svd(whitened, full_matrices=False)
    A = (vectors @ (whitened @ right[:rank].T / roots)).T
    # Singular vectors have no sign of their own: the largest entry is positive.
    A = A * A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
    if len(A) < rank:  # More ranks than outputs: the rest would be of no use.
        A = nn.functional.pad(A, (0, 0, 0, rank - len(A)))
    variances = ((A @ xx[given:, given:]) * A).sum(1)
    scales = ((inner if given else zz).diagonal().mean() / variances).sqrt()
    return A * torch.where(variances > 0, scales, 0)[:, None]
