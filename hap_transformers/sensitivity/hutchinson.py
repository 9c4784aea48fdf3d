"""Hutchinson's stochastic trace of the Hessian, all heads from each Hessian-vector product."""

from collections.abc import Iterable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from ..blocks import AttentionBlock
from .batches import LossFunction, ScoredBatch
from .report import Sensitivity
from .statistics import SampleMoments


def hessian_trace(
    model: PreTrainedModel,
    blocks: list[AttentionBlock],
    batches: Iterable[ScoredBatch],
    loss_fn: LossFunction,
    num_probes: int,
    generator: torch.Generator,
) -> Sensitivity:
    r"""Estimates every head's relative Hessian trace with Rademacher probes.

    With v uniform on {-1, 1} over all scored weights, the block sum over a head c of v * Hv is an unbiased estimate of
    its trace,

        Tr(H_cc) = E[ v_c . (Hv)_c ],

    and the relative trace is S_c = Tr(H_cc) / (2 p_c) * ||w_c||^2 (Equation 5 of
    [HAP](https://arxiv.org/abs/2101.08940); Hutchinson, "A stochastic estimator of the trace of the influence
    matrix", 1989). One double-backward graph a batch serves all its probes.

    Args:
        model (`PreTrainedModel`): The model, in evaluation mode.
        blocks (`list[AttentionBlock]`): Its attention blocks with at least one head.
        batches (`Iterable[ScoredBatch]`): The data.
        loss_fn (`LossFunction`): Mean loss of a batch.
        num_probes (`int`): Probes a batch.
        generator (`torch.Generator`): Source of the probes, on the CPU.

    Returns:
        `Sensitivity`: With `heads`, `head_traces` and `head_stderr`, one tensor a block.

    Raises:
        ValueError: If the model's attention kernel cannot be differentiated twice.
    """
    kernel = model.config._attn_implementation
    if kernel not in ("eager", "sdpa"):
        raise ValueError(
            f"method='hessian_trace' needs second derivatives, which attn_implementation='{kernel}' does not have. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    parameters = [parameter for block in blocks for parameter, _ in block.head_parameters()]
    moments = SampleMoments(sum(block.num_heads for block in blocks))
    # Fused attention has no double backward; the math kernel does.
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            loss = batch.checked_loss(loss_fn, model)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            samples = []
            for probe in range(num_probes):
                probes = [_rademacher(parameter, generator) for parameter in parameters]
                products = torch.autograd.grad(gradients, parameters, probes, retain_graph=probe < num_probes - 1)
                samples.append(_sum_over_heads(blocks, [v * hv for v, hv in zip(probes, products, strict=True)]))
            moments.add_batch(torch.stack(samples), batch.size)
    norms = _sum_over_heads(blocks, [parameter.detach() ** 2 for parameter in parameters]).double().cpu()
    sizes = torch.cat([torch.full((block.num_heads,), float(block.weights_per_head())) for block in blocks]).double()
    scale = norms / (2 * sizes)
    counts = [block.num_heads for block in blocks]
    stderr = moments.standard_error()
    return Sensitivity(
        method="hessian_trace",
        heads=list((scale * moments.mean).split(counts)),
        head_traces=list(moments.mean.split(counts)),
        head_stderr=None if stderr is None else list(stderr.split(counts)),
        num_examples=int(moments.weight),
        num_probes=num_probes,
        reliability=moments.reliability(scale),
    )


def _rademacher(parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    # Drawn on the CPU, so that a seed gives the same probes on every device.
    signs = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8)
    return signs.to(device=parameter.device, dtype=parameter.dtype).mul_(2).sub_(1)


def _sum_over_heads(blocks: list[AttentionBlock], tensors: list[torch.Tensor]) -> torch.Tensor:
    """Block sums of tensors shaped like all blocks' head parameters, shape `(heads of all blocks,)`."""
    remaining, sums = iter(tensors), []
    for block in blocks:
        sums.append(block.sum_over_heads([next(remaining) for _ in block.head_parameters()]))
    return torch.cat(sums)
