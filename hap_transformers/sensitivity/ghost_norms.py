"""Computes per-example gradient norms of slices of a linear map without storing the gradients."""

import torch


# Elements of the largest temporary tensor. 2 MiB of float32 stay in a processor's cache. An accelerator needs large
# products to be busy; 256 MiB are little of its memory.
CHUNK = 2**19
CHUNK_OF_ACCELERATORS = 2**26


def squared_gradient_norms(
    owned: torch.Tensor, other: torch.Tensor, gram: torch.Tensor | None = None, bias: bool = False
) -> torch.Tensor:
    r"""Computes each example's squared gradient norm of every row, or of every column, of a linear map.

    The gradient of y_t = W x_t with cotangents g_t is sum_t g_t x_t^T. Its row o has the squared norm

        || sum_t g_to x_t ||^2 = g_o^T (X X^T) g_o        (+ (sum_t g_to)^2 for the row's bias).

    Its column j has the squared norm x_j^T (G G^T) x_j: x and g exchange roles. The right-hand form ("ghost norm",
    Goodfellow, [arXiv 1510.01799](https://arxiv.org/abs/1510.01799); Li et al.,
    [arXiv 2110.05679](https://arxiv.org/abs/2110.05679)) takes T^2 (F + D) multiplications per example, the left-hand
    form T F D. The function uses the cheaper form.

    Args:
        owned (`torch.Tensor`): Shape `(examples, T, F)`. Each of its features corresponds to one slice: g for rows, x
            for columns.
        other (`torch.Tensor`): Shape `(examples, T, D)`. The other factor of the gradient: x for rows, g for columns.
        gram (`torch.Tensor`, *optional*): `gram_matrix(other)`, if it is already computed.
        bias (`bool`, *optional*, defaults to `False`): Whether each slice includes a bias.

    Returns:
        `torch.Tensor`: Shape `(examples, F)`, float64 for float64 inputs, otherwise float32.

    Example:
        >>> g, x = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
        >>> explicit = (g.mT @ x).square().sum(2) + g.sum(1).square()
        >>> torch.allclose(squared_gradient_norms(g, x, bias=True), explicit, rtol=1e-4)
        True
    """
    if owned.dtype == torch.float16:
        return _normalized_half(owned, other, bias)
    if prefers_ghost(owned, other):
        gram = gram_matrix(other) if gram is None else gram
        return _ghost(owned, gram + 1 if bias else gram)
    return _direct(owned, other, bias)


def prefers_ghost(owned: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the ghost form takes fewer multiplications than the direct one."""
    length, features, dimensions = owned.shape[1], owned.shape[2], other.shape[2]
    return length * (features + dimensions) <= features * dimensions


def gram_matrix(tokens: torch.Tensor) -> torch.Tensor:
    """Computes the inner products of each example's tokens, shape `(examples, T, T)`."""
    return tokens @ tokens.mT


def _ghost(owned: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    size = max(1, _chunk(owned) // (owned.shape[1] * owned.shape[2]))
    # In fp16, products of numbers below 2^-12 would underflow. bf16 has the range of float32.
    dtype = torch.float32 if owned.dtype == torch.float16 else owned.dtype
    parts = [
        torch.bmm(part_gram, part).to(dtype).mul_(part).sum(1, dtype=_sum_dtype(owned))
        for part, part_gram in zip(owned.split(size), gram.split(size), strict=True)
    ]
    return torch.cat(parts)


def _direct(owned: torch.Tensor, other: torch.Tensor, bias: bool) -> torch.Tensor:
    dtype, width = _sum_dtype(owned), max(1, other.shape[2])
    columns = []
    for features in owned.split(max(1, _chunk(owned) // width), dim=2):
        size = max(1, _chunk(owned) // (features.shape[2] * width))
        parts = [
            torch.bmm(part.mT, part_other).to(dtype).square_().sum(2, dtype=dtype)
            for part, part_other in zip(features.split(size), other.split(size), strict=True)
        ]
        columns.append(torch.cat(parts))
    norms = torch.cat(columns, 1)
    return norms + owned.sum(1, dtype=dtype).square() if bias else norms


def _normalized_half(owned: torch.Tensor, other: torch.Tensor, bias: bool) -> torch.Tensor:
    """Computes the norms in fp16 without overflow.

    Tokens of `other` are scaled to norms below 1, `owned` to values below 1. The scales are powers of two, so undoing
    them is exact.
    """
    owned_exponent = torch.frexp(owned.abs().amax().float()).exponent
    other_exponent = torch.frexp(other.float().norm(dim=2).amax()).exponent
    owned = torch.ldexp(owned.float(), -owned_exponent).half()
    other = torch.ldexp(other.float(), -other_exponent).half()
    if prefers_ghost(owned, other):
        gram = gram_matrix(other)
        norms = _ghost(owned, gram)
    else:
        norms = _direct(owned, other, bias=False)
    norms = torch.ldexp(norms, 2 * other_exponent)
    if bias:
        norms = norms + owned.sum(1, dtype=torch.float32).square()
    return torch.ldexp(norms, 2 * owned_exponent)


def _chunk(tensor: torch.Tensor) -> int:
    return CHUNK if tensor.device.type == "cpu" else CHUNK_OF_ACCELERATORS


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
