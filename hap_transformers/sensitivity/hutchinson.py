"""Hutchinson's stochastic trace of the Hessian, all heads and neurons from each Hessian-vector product."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .batches import ScoredBatch
from .task import Samples, ScoringTask


def hessian_trace(task: ScoringTask, batch: ScoredBatch) -> Samples:
    r"""Each probe's estimate of every component's Hessian trace.

    With v uniform on {-1, 1} over all scored weights, the block sum over a component c of v * Hv is an unbiased
    estimate of its trace,

        Tr(H_cc) = E[ v_c . (Hv)_c ]

    (Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989; HAP,
    [arXiv 2101.08940](https://arxiv.org/abs/2101.08940)). One double-backward graph serves all probes of a batch.

    Raises:
        ValueError: If the model's attention kernel cannot be differentiated twice.
    """
    kernel = task.model.config._attn_implementation
    if kernel not in ("eager", "sdpa"):
        raise ValueError(
            f"method='hessian_trace' needs second derivatives, which attn_implementation='{kernel}' does not have. "
            "Load the model with attn_implementation='sdpa' or 'eager', or use method='gauss_newton_trace'."
        )
    parameters, generator, scale = task.parameters, task.generator(batch), task.precision.scale
    # Fused attention has no double backward; the math kernel does.
    with sdpa_kernel(SDPBackend.MATH):
        loss = task.loss(batch)
        gradients = torch.autograd.grad(loss * scale, parameters, create_graph=True)
        values = []
        for probe in range(task.num_probes):
            probes = [_rademacher(parameter, generator) for parameter in parameters]
            products = torch.autograd.grad(gradients, parameters, probes, retain_graph=probe < task.num_probes - 1)
            for v, product in zip(probes, products, strict=True):
                v.mul_(product)
            values.append(task.sum_over_components(dict(zip(parameters, probes, strict=True))) / scale)
    return Samples(torch.stack(values), task.num_probes)


def _rademacher(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, parameter.shape, generator=generator, device=parameter.device, dtype=torch.int8)
    return signs.to(parameter.dtype).mul_(2).sub_(1)
