"""Factors the loss's Hessian in the model's outputs into the directions that Gauss-Newton passes backpropagate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from ..tokens import device_of_sums
from .probes import rademacher


# Directions per example up to which all are backpropagated, unless a setting says otherwise; that costs one backward
# pass per direction. Above, random mixtures cost `num_probes` backward passes (4 by default).
EXACT_DIRECTIONS = 16
# Classes up to which the Hessian of each position is formed and factored; that costs one Hessian product per class and
# classes^2 numbers per position. Above, the Hessian must be that of a softmax, which is factored without forming it.
EXPLICIT_CLASSES = 64
# Curvature of a position below so many roundings of the loss is none: no factor has to match it.
ROUNDINGS = 4


class UnsuitableLossError(ValueError):
    """A loss has no curvature in the logits; the message lacks the loss's name."""


@dataclass
class OutputDirections:
    """Cotangents s_k of the outputs with sum_k s_k s_k^T = H, the loss's Hessian in the outputs.

    The equation holds exactly or, for random mixtures, in expectation.

    Args:
        cotangents (`Iterator[list[torch.Tensor]]`): For each k, one tensor shaped like each output. An example's
            cotangents belong to the loss of that example alone, not to its share in the batch's mean.
        count (`int`): Number of directions.
        num_probes (`int`): 0 if the directions are exact, otherwise the number of random mixtures. For mixtures the
            *mean* of s_k s_k^T, not the sum, gives H.
    """

    cotangents: Iterator[list[torch.Tensor]]
    count: int
    num_probes: int


def output_directions(
    loss: torch.Tensor,
    outputs: list[torch.Tensor],
    examples: int,
    num_probes: int,
    generator: torch.Generator,
    exact_directions: int = EXACT_DIRECTIONS,
) -> OutputDirections:
    r"""Factors the Hessian of a batch's mean loss in the model's outputs.

    The graph from the outputs to the loss is differentiated twice, so the loss can be any function that meets two
    conditions: it is convex in the outputs, and it couples neither examples nor the positions (tokens) within an
    example. The factors are checked against that graph with a random vector.

    With C classes the Hessian of one position is C x C. It is formed and factored; softmax cross-entropy gives rank
    C - 1, squared error rank 1 per output. With more than `EXPLICIT_CLASSES` classes it is never formed. It must then
    be diagonal, as for losses that act on each output separately (many labels, a discriminator's tokens, regression
    with many outputs), or that of a softmax cross-entropy, w (diag p - p p^T) with the square root
    w^1/2 (diag p^1/2 - p (p^1/2)^T).

    If an example has more than `exact_directions` directions (many positions or many classes), `num_probes` mixtures
    of the directions with random signs replace them. Then E[s s^T] = H.

    Args:
        loss (`torch.Tensor`): The mean loss, with its graph.
        outputs (`list[torch.Tensor]`): The outputs that the loss was computed from, each `(examples, ..., classes)`.
        examples (`int`): Number of examples.
        num_probes (`int`): Number of random mixtures, if there are too many directions.
        generator (`torch.Generator`): Source of the random signs.
        exact_directions (`int`, *optional*, defaults to 16): Directions per example up to which all are
            backpropagated.

    Returns:
        `OutputDirections`: The directions.

    Raises:
        ValueError: If the loss does not depend on the outputs, has no curvature in them, is not convex, couples
            examples or positions, or has more than `EXPLICIT_CLASSES` classes and is neither a softmax cross-entropy
            nor a sum over outputs.
    """
    used = [
        i
        for i, g in enumerate(torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True))
        if g is not None
    ]
    if not used:
        raise UnsuitableLossError("does not depend on the logits that the model returns.")
    tensors = [outputs[i] for i in used]
    _validate_rows(tensors, examples)
    vectors = [_randn(tensor, generator) for tensor in tensors]
    # In fp16 second derivatives underflow without a scale, and overflow with a large one.
    for scale in (2.0**14, 2.0**9, 2.0**4, 1.0) if tensors[0].dtype == torch.float16 else (1.0,):
        gradients = torch.autograd.grad(loss * scale, tensors, create_graph=True)
        if not all(gradient.requires_grad for gradient in gradients):
            raise UnsuitableLossError(
                "is linear in the model's logits, so its Gauss-Newton matrix is zero; or its backward pass cannot be "
                "differentiated."
            )
        products = _hessian_product(gradients, tensors, vectors, examples / scale)
        if all(product.isfinite().all() for product in products):
            break
    noise = ROUNDINGS * torch.finfo(loss.dtype).eps
    factors = [
        _factor(gradient, tensor, _positions(v, examples), _positions(hv, examples), scale, noise)
        for gradient, tensor, v, hv in zip(gradients, tensors, vectors, products, strict=True)
    ]
    count = sum(factor.positions * factor.rank for factor in factors)

    def shaped(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        cotangents: list[torch.Tensor] = [torch.zeros_like(output) for output in outputs]
        for i, part in zip(used, parts, strict=True):
            cotangents[i] = part.reshape(outputs[i].shape).to(outputs[i].dtype)
        return cotangents

    explicit = [factor for factor in factors if isinstance(factor, _ExplicitFactor)]
    if count > exact_directions or len(explicit) < len(factors):
        mixtures = (shaped([factor.mixture(generator) for factor in factors]) for _ in range(num_probes))
        return OutputDirections(mixtures, num_probes, num_probes)
    exact = (
        shaped([f.direction(position, k) if f is factor else f.nothing() for f in explicit])
        for factor in explicit
        for position in range(factor.positions)
        for k in range(factor.rank)
    )
    return OutputDirections(exact, count, 0)


def curvature_along(
    loss: torch.Tensor, outputs: list[torch.Tensor], examples: int
) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """A function that takes changes v of the outputs, returns v^T H v of every example, shape `(examples,)`.

    Args:
        loss (`torch.Tensor`): The mean loss of a batch, with its graph.
        outputs (`list[torch.Tensor]`): The outputs that it was computed from.
        examples (`int`): Number of examples. H is that of an example's loss, not of its share in the mean.

    Raises:
        ValueError: If the loss has no curvature in the outputs.
    """
    # In fp16 second derivatives underflow without a scale.
    scale = 2.0**9 if outputs[0].dtype == torch.float16 else 1.0
    gradients = torch.autograd.grad(loss * scale, outputs, create_graph=True, materialize_grads=True)
    curved = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
    if not curved:
        raise UnsuitableLossError("is linear in the model's logits, or does not depend on them.")
    _validate_rows([outputs[i] for i in curved], examples)

    def along(changes: list[torch.Tensor]) -> torch.Tensor:
        vectors = [changes[i].to(outputs[i].dtype) for i in curved]
        products = _hessian_product([gradients[i] for i in curved], outputs, vectors, examples / scale)
        parts = zip(changes, products, strict=True)
        return torch.stack([(v.to(hv.dtype) * hv).reshape(examples, -1).sum(1) for v, hv in parts]).sum(0)

    return along


@dataclass
class _ExplicitFactor:
    """R with R R^T = H for every position; `columns` has shape `(examples, positions, classes, rank)`."""

    columns: torch.Tensor

    @property
    def positions(self) -> int:
        return self.columns.shape[1]

    @property
    def rank(self) -> int:
        return self.columns.shape[3]

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bpck,bpdk,bpd->bpc", self.columns, self.columns, vector)

    def norm(self) -> torch.Tensor:
        return (self.columns.mT @ self.columns).norm()

    def nothing(self) -> torch.Tensor:
        return torch.zeros_like(self.columns[..., 0])

    def direction(self, position: int, k: int) -> torch.Tensor:
        cotangent = self.nothing()
        cotangent[:, position] = self.columns[:, position, :, k]
        return cotangent

    def mixture(self, generator: torch.Generator) -> torch.Tensor:
        signs = rademacher(self.columns[:, :, 0].shape, self.columns, generator)
        return (self.columns * signs[:, :, None]).sum(3)


@dataclass
class _DiagonalFactor:
    """The square root of a diagonal H, whose entries have the shape `(examples, positions, classes)`."""

    entries: torch.Tensor

    @property
    def positions(self) -> int:
        return self.entries.shape[1]

    @property
    def rank(self) -> int:
        return self.entries.shape[2]

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        return self.entries * vector

    def norm(self) -> torch.Tensor:
        return self.entries.norm()

    def mixture(self, generator: torch.Generator) -> torch.Tensor:
        return self.entries.clamp_min(0).sqrt() * rademacher(self.entries.shape, self.entries, generator)


@dataclass
class _SoftmaxFactor:
    """The square root of w (diag p - p p^T), with p `(examples, positions, classes)` and w `(examples, positions)`."""

    probabilities: torch.Tensor
    weight: torch.Tensor

    @property
    def positions(self) -> int:
        return self.probabilities.shape[1]

    @property
    def rank(self) -> int:
        return self.probabilities.shape[2] - 1

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        return self.weight[..., None] * softmax_hessian_product(self.probabilities, vector)

    def norm(self) -> torch.Tensor:
        second, third = self.probabilities.square().sum(-1), self.probabilities.pow(3).sum(-1)
        return (self.weight * (second - 2 * third + second.square()).clamp_min(0).sqrt()).norm()

    def mixture(self, generator: torch.Generator) -> torch.Tensor:
        roots = self.probabilities.sqrt() * rademacher(self.probabilities.shape, self.probabilities, generator)
        centred = roots - self.probabilities * roots.sum(-1, keepdim=True)
        return self.weight.sqrt()[..., None] * centred


def softmax_hessian_product(probabilities: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Computes (diag p - p p^T) v along the last dimension."""
    weighted = probabilities * vector
    return weighted - probabilities * weighted.sum(-1, keepdim=True)


_Factor = _ExplicitFactor | _DiagonalFactor | _SoftmaxFactor


def _factor(
    gradient: torch.Tensor,
    output: torch.Tensor,
    vector: torch.Tensor,
    product: torch.Tensor,
    scale: float,
    noise: float,
) -> _Factor:
    """Factors the Hessian in one output, given its product with a random vector and the rounding of the loss.

    Raises:
        ValueError: If it has no factor that is known here.
    """
    examples = len(vector)
    if vector.shape[2] <= EXPLICIT_CLASSES:
        factors: list[_Factor] = [_explicit_factor(gradient, output, examples, scale, noise)]
    else:
        (sums,) = _hessian_product([gradient], [output], [torch.ones_like(output)], examples / scale)
        factors = [_DiagonalFactor(_positions(sums, examples)), _softmax_factor(output, vector, product, noise)]
    found = min(factors, key=lambda factor: _error(factor, vector, product))
    if not _fits(found, output, vector, product, noise):
        reasons = ["couples examples or positions"]
        if vector.shape[2] > EXPLICIT_CLASSES:
            reasons.append(f"is no softmax cross-entropy of the {vector.shape[2]} logits nor a sum over outputs")
        if output.dtype.itemsize < 4:
            reasons.append(f"needs more digits than {str(output.dtype).removeprefix('torch.')} has")
        raise ValueError(
            f"The loss's Hessian in the model's logits cannot be factored. The loss {', or '.join(reasons)}. Use "
            "method='hessian_trace' or 'gradient'."
        )
    if isinstance(found, _DiagonalFactor):
        _validate_convex(found.entries, output.dtype, noise)
    return found


def _validate_convex(values: torch.Tensor, dtype: torch.dtype, noise: float) -> None:
    """Refuses eigenvalues of a Hessian that are negative beyond rounding."""
    if values.min() < -_tolerance(dtype) * values.abs().max() - noise:
        raise ValueError(
            "The loss is not convex in the model's logits, so its Gauss-Newton matrix has no square root. Use "
            "method='hessian_trace'."
        )


def _explicit_factor(
    gradient: torch.Tensor, output: torch.Tensor, examples: int, scale: float, noise: float
) -> _ExplicitFactor:
    classes = _positions(output, examples).shape[2]
    basis = torch.eye(classes, dtype=output.dtype, device=output.device)
    rows = []
    for row in basis:
        # Positions do not interact, so one product gives one row of every position's Hessian.
        vector = row.expand(_positions(output, examples).shape).reshape(output.shape)
        (product,) = _hessian_product([gradient], [output], [vector], examples / scale)
        rows.append(_positions(product, examples))
    hessian = torch.stack(rows, -2)
    values, columns = _eigen((hessian + hessian.mT) / 2)
    _validate_convex(values, output.dtype, noise)
    # Rounding leaves small values of zero eigenvalues. They are dropped, because each would cost a backward pass. But
    # beside one uncertain example, the small values of many confident ones add up.
    rounding = torch.finfo(output.dtype).eps * (64 if output.dtype.itemsize >= 4 else 2)
    kept = values.clamp_min(0).flatten(0, 1).norm(dim=0) > rounding * values.norm()
    return _ExplicitFactor((columns * values.clamp_min(0).sqrt()[:, :, None])[..., kept])


def _eigen(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors, in float64 where the numbers of one matrix are too far apart for float32."""
    with suppress(torch.linalg.LinAlgError):  # It may also give NaN without an error.
        values, columns = torch.linalg.eigh(matrices)
        if values.isfinite().all() and columns.isfinite().all():
            return values, columns
    values, columns = torch.linalg.eigh(matrices.to(device_of_sums(matrices.device)).double())
    return values.to(matrices), columns.to(matrices)


def _softmax_factor(output: torch.Tensor, vector: torch.Tensor, product: torch.Tensor, noise: float) -> _SoftmaxFactor:
    probabilities = _positions(output.detach(), len(vector)).to(vector.dtype).softmax(-1)
    mean = (probabilities * vector).sum(-1, keepdim=True)
    variance = (probabilities * (vector - mean) ** 2).sum(-1)
    # The loss determines each position's weight: one over the number of positions, or zero for an ignored label. A
    # position with a probability of nearly 1 has no curvature to derive its weight from; its weight is set to zero.
    least = min(noise, ROUNDINGS * torch.finfo(torch.float32).eps)  # Variances are of float32 or better.
    sure = variance < least * (mean**2).squeeze(-1).clamp_min(1)
    weight = ((vector * product).sum(-1) / variance.masked_fill(sure, 1)).clamp_min(0).masked_fill(sure, 0)
    return _SoftmaxFactor(probabilities, weight)


def _fits(factor: _Factor, output: torch.Tensor, vector: torch.Tensor, product: torch.Tensor, noise: float) -> bool:
    """Compares the factored Hessian with the loss's Hessian on one vector."""
    # If all predicted probabilities are nearly 1, the curvature is rounding noise, which no factor has to match. Of a
    # mean over positions each has its share.
    least = noise * vector.norm() / vector.shape[1]
    # Where one uncertain example has most of the curvature, its product with the vector may be small by chance, and
    # rounding is not. The root mean square of products with random vectors is the Hessian's Frobenius norm.
    size = torch.maximum(product.norm(), factor.norm())
    return _error(factor, vector, product) <= float(_tolerance(output.dtype) * size + least)


def _error(factor: _Factor, vector: torch.Tensor, product: torch.Tensor) -> float:
    return float((factor.product(vector) - product).norm())


def _hessian_product(
    gradients: Sequence[torch.Tensor], outputs: list[torch.Tensor], vectors: list[torch.Tensor], factor: float
) -> list[torch.Tensor]:
    """Multiplies the Hessian by a vector, and the product by `factor` in float32 or better."""
    products = torch.autograd.grad(gradients, outputs, vectors, retain_graph=True, materialize_grads=True)
    return [factor * product.to(torch.promote_types(product.dtype, torch.float32)) for product in products]


def _validate_rows(outputs: Sequence[torch.Tensor], examples: int) -> None:
    """Refuses outputs that are not those of the examples, equally many of each."""
    if rows := [len(output) for output in outputs if len(output) % examples]:
        raise UnsuitableLossError(
            f"is computed from outputs of {rows[0]} rows, which cannot be shared out among {examples} examples."
        )


def _positions(tensor: torch.Tensor, examples: int) -> torch.Tensor:
    """Reshapes an output to `(examples, positions, classes)`; a one-dimensional output has one class."""
    classes = tensor.shape[-1] if tensor.ndim > 1 else 1
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide.reshape(examples, -1, classes)


def _tolerance(dtype: torch.dtype) -> float:
    # Transformers computes some losses in float32 even for float64 models.
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5


def _randn(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
