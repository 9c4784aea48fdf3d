"""Bases of a head's dimensions in which the least important ones can be left out."""

import torch


# Smallest second moment of a direction, in units of the mean over all, so that moments can be inverted.
RIDGE = 1e-6


def value_basis(moment: torch.Tensor, curvature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""A basis of value dimensions in which contexts are uncorrelated and their curvature is diagonal.

    A head's contexts c have the second moment A, and M is the curvature of the loss in them, W^T C W for the head's
    columns W of the output projection. With A = L L^T and L^T M L = U diag(e) U^T, the new contexts are U^T L^-1 c and
    the new columns W L U. The loss's curvature in a new dimension times its variance is e. Dimensions come in the
    order of what their removal costs, the dearest first.

    Args:
        moment (`torch.Tensor`): A, float64, shape `(dims, dims)`.
        curvature (`torch.Tensor`): M, of the same shape.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: B = U^T L^-1, which new rows of the value projection are B times the old
        ones by, and its inverse, both of shape `(dims, dims)`.

    Example:
        >>> A, M = torch.diag(torch.tensor([4.0, 1.0])).double(), torch.diag(torch.tensor([1.0, 9.0])).double()
        >>> B, inverse = value_basis(A, M)
        >>> (B @ A @ B.mT).round(decimals=4).tolist(), (inverse.mT @ M @ inverse).round(decimals=3).abs().tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [[9.0, 0.0], [0.0, 4.0]])
    """
    L, inverse = _root(moment)
    _, U = torch.linalg.eigh(L.mT @ curvature @ L)
    U = U.flip(-1)
    return U.mT @ inverse, L @ U


def query_key_bases(queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Bases of query and key dimensions in which both have the same, diagonal second moments.

    Queries have the second moment Q = L_q L_q^T, keys K = L_k L_k^T. With L_q^T L_k = U diag(s) V^T, the new queries
    are diag(s)^1/2 U^T L_q^-1 q and the new keys diag(s)^1/2 V^T L_k^-1 k. Their products are those of q and k
    (balanced truncation). The second moments of both are diag(s): dimensions come in the order of their share of the
    attention logits.

    Args:
        queries (`torch.Tensor`): Q, float64, shape `(dims, dims)`.
        keys (`torch.Tensor`): K, of the same shape.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The maps of queries and of keys, both of shape `(dims, dims)`.

    Example:
        >>> Q, K = torch.diag(torch.tensor([1.0, 4.0])).double(), torch.diag(torch.tensor([4.0, 9.0])).double()
        >>> of_queries, of_keys = query_key_bases(Q, K)
        >>> (of_queries.mT @ of_keys).round(decimals=4).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> (of_keys @ K @ of_keys.mT).round(decimals=3).abs().tolist()
        [[6.0, 0.0], [0.0, 2.0]]
    """
    (L_q, inverse_q), (L_k, inverse_k) = _root(queries), _root(keys)
    U, s, Vh = torch.linalg.svd(L_q.mT @ L_k)
    scale = s.sqrt()[:, None]
    return scale * (U.mT @ inverse_q), scale * (Vh @ inverse_k)


def _root(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L with L L^T = moment, and its inverse, both of shape `(dims, dims)`."""
    values, V = torch.linalg.eigh(moment)
    mean = float(moment.trace()) / max(len(moment), 1)
    scale = values.clamp_min(RIDGE * mean if mean > 0 else 1.0).sqrt()  # Heads that give nothing have the moment zero.
    return V * scale, (V / scale).mT
