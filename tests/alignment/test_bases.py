"""Closed forms of the bases of a head's dimensions, against explicit matrices."""

import pytest
import torch

from hap_transformers.alignment.bases import RIDGE, query_key_bases, value_basis


def moment(dims: int, rank: int, seed: int = 0) -> torch.Tensor:
    """The second moment of so many independent features, float64, shape `(dims, dims)`."""
    features = torch.randn(rank, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return features.T @ features


def invertible(matrix: torch.Tensor) -> torch.Tensor:
    """The same with a least eigenvalue."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp_min(RIDGE * values.mean()).diag() @ vectors.T


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max().clamp_min(1))
    )


@pytest.mark.parametrize("rank", [6, 3, 1], ids="rank {}".format)
def test_contexts_are_uncorrelated_and_their_curvature_is_diagonal(rank):
    """Of a singular moment the directions with variance; the others have next to none."""
    A, M = moment(6, rank), moment(6, 6, seed=1)
    B, inverse = value_basis(A, M)
    close(B @ inverse, torch.eye(6, dtype=torch.float64), 1e-8)
    A = invertible(A)
    close(B @ A @ B.T, torch.eye(6, dtype=torch.float64), 1e-8)
    costs = inverse.T @ M @ inverse
    close(costs, costs.diagonal().diag(), 1e-8)
    assert (costs.diagonal().diff() <= 1e-10 * costs.max()).all()  # The dearest first.
    # What the dimensions cost are the eigenvalues of the product of both matrices, in any basis.
    expected = torch.linalg.eigvals(A @ M).real.sort(descending=True).values
    close(costs.diagonal(), expected, 1e-8)


def test_leaving_out_the_last_dimensions_is_the_best_that_a_rank_can_do():
    """By the cost trace(M E A E^T) of the error E of a map of that rank, over random ones and Eckart-Young's bound."""
    A, M = moment(5, 9), moment(5, 7, seed=1)
    B, inverse = value_basis(A, M)
    root_A, root_M = (torch.linalg.cholesky(matrix) for matrix in (A, M))
    values = torch.linalg.svdvals(root_M.T @ root_A)
    for rank in range(6):
        error = torch.eye(5, dtype=torch.float64) - inverse[:, :rank] @ B[:rank]
        found = (M @ error @ A @ error.T).trace()
        assert float(found) == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("ranks", [(6, 6), (6, 2), (1, 6), (2, 2)], ids=str)
def test_queries_and_keys_have_the_same_diagonal_moments(ranks):
    Q, K = moment(6, ranks[0]), moment(6, ranks[1], seed=1)
    of_queries, of_keys = query_key_bases(Q, K)
    identity = torch.eye(6, dtype=torch.float64)
    close(of_queries.T @ of_keys, identity, 1e-8)
    moments = [basis @ invertible(matrix) @ basis.T for basis, matrix in ((of_queries, Q), (of_keys, K))]
    close(moments[0], moments[1], 1e-7)
    close(moments[0], moments[0].diagonal().diag(), 1e-7)
    assert (moments[0].diagonal().diff() <= 1e-10 * moments[0].max()).all()


def test_leaving_out_query_key_dimensions_is_best_for_independent_tokens():
    """The mean square of the logits' error is that of the singular values that are left out."""
    Q, K = moment(5, 9), moment(5, 8, seed=1)
    of_queries, of_keys = query_key_bases(Q, K)
    values = torch.linalg.svdvals(torch.linalg.cholesky(Q).T @ torch.linalg.cholesky(K))
    for rank in range(6):
        error = torch.eye(5, dtype=torch.float64) - of_queries[:rank].T @ of_keys[:rank]
        found = (error @ K @ error.T @ Q).trace()
        assert float(found) == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-4, abs=1e-9)


def test_heads_that_give_nothing_keep_finite_bases():
    nothing, some = torch.zeros(3, 3, dtype=torch.float64), moment(3, 3)
    for pair in ((nothing, some), (some, nothing), (nothing, nothing)):
        B, inverse = value_basis(*pair)
        close(B @ inverse, torch.eye(3, dtype=torch.float64), 1e-8)
        of_queries, of_keys = query_key_bases(*pair)
        assert of_queries.isfinite().all() and of_keys.isfinite().all()
        close(of_queries.T @ of_keys, torch.eye(3, dtype=torch.float64), 1e-8)


def test_heads_without_dimensions():
    empty = torch.zeros(0, 0, dtype=torch.float64)
    for basis in (*value_basis(empty, empty), *query_key_bases(empty, empty)):
        assert basis.shape == (0, 0)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_bases_do_not_depend_on_units(scale):
    """Contexts in other units give the same costs, and products of queries and keys are the same."""
    A, M = moment(4, 4), moment(4, 4, seed=1)
    costs = [
        inverse.T @ m @ inverse
        for m, (_, inverse) in ((M, value_basis(A, M)), (M / scale, value_basis(A * scale, M / scale)))
    ]
    close(costs[0].diagonal(), costs[1].diagonal(), 1e-7)
    of_queries, of_keys = query_key_bases(A * scale, M)
    close(of_queries.T @ of_keys, torch.eye(4, dtype=torch.float64), 1e-7)
