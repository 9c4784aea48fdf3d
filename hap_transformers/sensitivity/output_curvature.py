"""Square roots of the loss's Hessian in the model's outputs: the directions that a Gauss-Newton pass sends back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .probes import rademacher


# Up to this many directions an example the Gauss-Newton pass sends back every one of them; above, random mixtures.
EXACT_DIRECTIONS = 16
# Up to this many classes the Hessian of one position is formed and factored; above, it must be a softmax's.
EXPLICIT_CLASSES = 64


@dataclass
class OutputDirections:
    """Cotangents s_k of the outputs with sum_k s_k s_k^T = H, the loss's Hessian there, exactly or in expectation.

    Args:
        cotangents (`Iterator[list[torch.Tensor]]`): For each k, a tensor shaped like each output. Every example's
            are those of its own loss, as if it were alone in the batch.
        count (`int`): Number of directions.
        num_probes (`int`): 0 if they are exact, or the number of random mixtures; then their *mean* gives H.
    """

    cotangents: Iterator[list[torch.Tensor]]
    count: int
    num_probes: int


def output_directions(
    loss: torch.Tensor, outputs: list[torch.Tensor], examples: int, num_probes: int, generator: torch.Generator
) -> OutputDirections:
    r"""Factors the Hessian of a batch's mean loss in the model's outputs.

    The Hessian is found by differentiating twice the graph that leads from the outputs to the loss, whatever that
    graph is: nothing is assumed of the loss but that it is convex in the outputs and treats examples, and positions
    within an example (tokens), apart from each other. The factors are checked against that graph with a random
    vector.

    With C classes the Hessian of one position is C x C. It is formed and factored (softmax cross-entropy: rank C - 1;
    squared error: rank 1 an output). With very many classes it must be a softmax cross-entropy's, w (diag p - p p^T),
    whose square root w^1/2 (diag p^1/2 - p (p^1/2)^T) is never formed. Where an example has many directions (many
    positions, many classes), `num_probes` mixtures of them with random signs take their place, which leaves
    E[s s^T] = H.

    Args:
        loss (`torch.Tensor`): The mean loss, with its graph.
        outputs (`list[torch.Tensor]`): The outputs it was computed from, each `(examples, ..., classes)`.
        examples (`int`): Number of examples.
        num_probes (`int`): Random mixtures, where directions are too many.
        generator (`torch.Generator`): Source of the signs.

    Returns:
        `OutputDirections`: The directions.

    Raises:
        ValueError: If the loss does not depend on the outputs, has no curvature in them, is not convex, couples
            examples or positions, or has more classes than can be factored and is no softmax cross-entropy.
    """
    used = [
        i
        for i, g in enumerate(torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True))
        if g is not None
    ]
    if not used:
        raise ValueError("The loss does not depend on the model's logits; method='gauss_newton_trace' needs that.")
    tensors = [outputs[i] for i in used]
    vectors = [_randn(tensor, generator) for tensor in tensors]
    # In fp16 second derivatives underflow, or, multiplied by too much, overflow.
    for scale in (2.0**14, 2.0**9, 2.0**4, 1.0) if tensors[0].dtype == torch.float16 else (1.0,):
        gradients = torch.autograd.grad(loss * scale, tensors, create_graph=True)
        if not all(gradient.requires_grad for gradient in gradients):
            raise ValueError("The loss is linear in the model's logits, so its Gauss-Newton matrix is zero.")
        products = _hessian_product(gradients, tensors, vectors, examples / scale)
        if all(product.isfinite().all() for product in products):
            break
    factors = [
        _explicit_factor(gradient, tensor, examples, scale)
        if _positions(tensor, examples).shape[2] <= EXPLICIT_CLASSES
        else _softmax_factor(tensor, _positions(v, examples), _positions(hv, examples))
        for gradient, tensor, v, hv in zip(gradients, tensors, vectors, products, strict=True)
    ]
    for factor, tensor, v, hv in zip(factors, tensors, vectors, products, strict=True):
        _check(factor, tensor, _positions(v, examples), _positions(hv, examples))
    count = sum(factor.positions * factor.rank for factor in factors)

    def shaped(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        cotangents: list[torch.Tensor] = [torch.zeros_like(output) for output in outputs]
        for i, part in zip(used, parts, strict=True):
            cotangents[i] = part.reshape(outputs[i].shape).to(outputs[i].dtype)
        return cotangents

    if count > EXACT_DIRECTIONS:
        mixtures = (shaped([factor.mixture(generator) for factor in factors]) for _ in range(num_probes))
        return OutputDirections(mixtures, num_probes, num_probes)
    # A factor of a softmax alone has more directions than that.
    explicit = [factor for factor in factors if isinstance(factor, _ExplicitFactor)]
    exact = (
        shaped([f.direction(position, k) if f is factor else f.nothing() for f in explicit])
        for factor in explicit
        for position in range(factor.positions)
        for k in range(factor.rank)
    )
    return OutputDirections(exact, count, 0)


@dataclass
class _ExplicitFactor:
    """R with R R^T = H for every position, `columns` of shape `(examples, positions, classes, rank)`."""

    columns: torch.Tensor

    @property
    def positions(self) -> int:
        return self.columns.shape[1]

    @property
    def rank(self) -> int:
        return self.columns.shape[3]

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bpck,bpdk,bpd->bpc", self.columns, self.columns, vector)

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
class _SoftmaxFactor:
    """The root of w (diag p - p p^T), with p of shape `(examples, positions, classes)` and a w a position."""

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

    def mixture(self, generator: torch.Generator) -> torch.Tensor:
        roots = self.probabilities.sqrt() * rademacher(self.probabilities.shape, self.probabilities, generator)
        centred = roots - self.probabilities * roots.sum(-1, keepdim=True)
        return self.weight.sqrt()[..., None] * centred


def softmax_hessian_product(probabilities: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """(diag p - p p^T) v along the last dimension."""
    weighted = probabilities * vector
    return weighted - probabilities * weighted.sum(-1, keepdim=True)


def _explicit_factor(gradient: torch.Tensor, output: torch.Tensor, examples: int, scale: float) -> _ExplicitFactor:
    classes = _positions(output, examples).shape[2]
    basis = torch.eye(classes, dtype=output.dtype, device=output.device)
    rows = []
    for row in basis:
        # Positions do not interact, so one product gives this row of every position's Hessian.
        vector = row.expand(_positions(output, examples).shape).reshape(output.shape)
        (product,) = _hessian_product([gradient], [output], [vector], examples / scale)
        rows.append(_positions(product, examples))
    hessian = torch.stack(rows, -2)
    values, columns = torch.linalg.eigh((hessian + hessian.mT) / 2)
    if values.min() < -_tolerance(output.dtype) * values.abs().max() - torch.finfo(output.dtype).eps:
        raise ValueError(
            "The loss is not convex in the model's logits, so its Gauss-Newton matrix has no square root. Use "
            "method='hessian_trace'."
        )
    # What is left of zero eigenvalues after rounding is not worth a backward pass.
    rounding = torch.finfo(output.dtype).eps * (64 if output.dtype.itemsize >= 4 else 2)
    kept = (values > rounding * values.max()).any(1).any(0)
    return _ExplicitFactor((columns * values.clamp_min(0).sqrt()[:, :, None])[..., kept])


def _softmax_factor(output: torch.Tensor, vector: torch.Tensor, product: torch.Tensor) -> _SoftmaxFactor:
    probabilities = _positions(output.detach(), len(vector)).to(vector.dtype).softmax(-1)
    mean = (probabilities * vector).sum(-1, keepdim=True)
    variance = (probabilities * (vector - mean) ** 2).sum(-1)
    # The weight of a position (one over their number, zero where the label is ignored) is read off the loss itself. A
    # position that is sure of its class has no curvature to read it off, and needs none.
    sure = variance < 64 * torch.finfo(vector.dtype).eps * (mean**2).squeeze(-1).clamp_min(1)
    weight = ((vector * product).sum(-1) / variance.masked_fill(sure, 1)).clamp_min(0).masked_fill(sure, 0)
    return _SoftmaxFactor(probabilities, weight)


def _check(
    factor: _ExplicitFactor | _SoftmaxFactor, output: torch.Tensor, vector: torch.Tensor, product: torch.Tensor
) -> None:
    """Compares the factored Hessian with the loss's own on one vector."""
    error = (factor.product(vector) - product).norm()
    # Where every example is sure of its class all curvature is rounding noise, to which no factor need fit.
    noise = torch.finfo(output.dtype).eps * vector.norm()
    if not error <= _tolerance(output.dtype) * product.norm() + noise:
        raise ValueError(
            "The loss's Hessian in the model's logits has no factor that is known here: the loss couples examples or "
            f"positions, or it has more than {EXPLICIT_CLASSES} classes and is no softmax cross-entropy. Use "
            "method='hessian_trace' or 'gradient'."
        )


def _hessian_product(
    gradients: Sequence[torch.Tensor], outputs: list[torch.Tensor], vectors: list[torch.Tensor], factor: float
) -> list[torch.Tensor]:
    """The Hessian times a vector, multiplied by `factor` in float32 or better."""
    products = torch.autograd.grad(gradients, outputs, vectors, retain_graph=True, materialize_grads=True)
    return [factor * product.to(torch.promote_types(product.dtype, torch.float32)) for product in products]


def _positions(tensor: torch.Tensor, examples: int) -> torch.Tensor:
    """Views an output as `(examples, positions, classes)`; an output without dimensions for classes has one."""
    classes = tensor.shape[-1] if tensor.ndim > 1 else 1
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return wide.reshape(examples, -1, classes)


def _tolerance(dtype: torch.dtype) -> float:
    # Losses of Transformers go through float32 even in float64 models.
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5


def _randn(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
