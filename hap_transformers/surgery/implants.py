"""Low-rank linear maps in the place of removed neurons."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..components.groups import FeedForwardBlock
from ..components.projections import Projection
from ..components.pruned_modules import set_implant_rank
from ..refit.ridge import solve_ridge


def validate_implantable(model: PreTrainedModel, blocks: Iterable[FeedForwardBlock]) -> None:
    """Checks that linear neurons can be put into some blocks.

    Raises:
        ValueError: If a block's activation module is not known, or an implant is there already.
    """
    for block in blocks:
        if block.activation is None:
            raise ValueError(
                f"Cannot implant into layer {block.index} of {type(model).__name__}: the entry of "
                f"'{model.config.model_type}' in hap_transformers.ARCHITECTURES names no activation. Nothing was "
                "pruned."
            )
        if block.implant_rank:
            raise ValueError(
                f"Layer {block.index} of {type(model).__name__} has an implant of rank {block.implant_rank} already. "
                "Set implant_ratio=0 to prune it further. Nothing was pruned."
            )


def insert_implant(block: FeedForwardBlock, rank: int) -> None:
    """Turns the last neurons of a block into a linear map x -> B A x of some rank.

    An implant ([HAP](https://arxiv.org/abs/2101.08940)) is `rank` neurons whose activation is the identity: A's rows
    are theirs of the input projection, B's columns theirs of the output projection, so that the block is still two
    products with ordinary weights. A keeps the rows that it finds there, which belonged to removed neurons; B is zero.

    Args:
        block (`FeedForwardBlock`): The block; its last `rank` neurons are given up.
        rank (`int`): The rank.
    """
    set_implant_rank(block, rank)
    set_input_map(block, _rows(block.inputs[-1], rank).detach().clone())
    with torch.no_grad():
        block.output.matrix(block.output.module.weight)[:, -rank:] = 0


def set_input_map(block: FeedForwardBlock, A: torch.Tensor) -> None:
    """Lets an implant read A x, without biases; A has the shape `(rank, features)`."""
    *gates, linear = block.inputs
    with torch.no_grad():
        for gate in gates:
            _rows(gate, len(A)).zero_()  # The gate is 1 whatever it reads.
        _rows(linear, len(A)).copy_(A)
        for projection in block.inputs:
            if projection.module.bias is not None:
                projection.outputs_of(projection.module.bias)[-len(A) :] = 0


def _rows(projection: Projection, rank: int) -> torch.Tensor:
    """The rows of a projection that belong to the last `rank` neurons, as a view."""
    return projection.matrix(projection.module.weight)[-rank:]


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
