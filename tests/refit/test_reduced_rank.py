"""Reduced-rank regression equals the solution by singular value decomposition."""

import pytest
import torch

from hap_transformers.refit.reduced_rank import reduced_rank_regression


def test_reduced_rank_regression_is_the_svd_solution():
    """The residual is the smallest that a map of this rank can leave, by the SVD of the fitted values."""
    generator = torch.Generator().manual_seed(0)
    X, Z, Y = (torch.randn(60, n, generator=generator, dtype=torch.float64) for n in (4, 6, 5))
    F = torch.cat([X, Z], 1)
    for rank in (1, 2, 4):
        A = reduced_rank_regression(F.T @ F, F.T @ Y, rank, 4, ridge=0.0)
        features = torch.cat([X, Z @ A.T], 1)
        left = Y - features @ torch.linalg.lstsq(features, Y).solution
        projector = X @ torch.linalg.pinv(X)
        z, y = Z - projector @ Z, Y - projector @ Y
        fitted = z @ torch.linalg.lstsq(z, y).solution
        values = torch.linalg.svdvals(fitted)
        expected = (y - fitted).square().sum() + values[rank:].square().sum()
        assert left.square().sum().item() == pytest.approx(expected.item(), rel=1e-9)
        variances = (Z @ A.T).square().sum(0)
        torch.testing.assert_close(variances, (X**2).sum(0).mean().expand(rank))
