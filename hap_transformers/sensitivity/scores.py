"""From the means of a method's samples to scores."""

import math
from typing import Any

import torch

from ..components.groups import AttentionBlock, Block, FeedForwardBlock
from .sensitivity import Sensitivity
from .statistics import SampleMoments


TRACE_METHODS = ("gauss_newton_trace", "hessian_trace")
# Methods whose scores of heads and of neurons are both changes of the loss.
COMPARABLE_METHODS = ("kronecker", *TRACE_METHODS, "fisher")


def component_scores(
    method: str, blocks: list[Block], squared_norms: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    """Turns each component's mean into its score.

    Args:
        method (`str`): The method. Traces become relative traces, Tr(H_cc) / (2 p_c) * ||w_c||^2 (Equation 5 of
            [HAP](https://arxiv.org/abs/2101.08940)); mask gradients of heads are divided by the L2 norm of their
            layer's, as in [Michel et al. 2019](https://arxiv.org/abs/1905.10650); diagonals of the mask-space
            Gauss-Newton matrix are halved, to the second-order change of the loss. The means of `"kronecker"` are
            taken for traces, too; its scores come from elsewhere, and these tell how reliable they are.
        blocks (`list[Block]`): The blocks of the components.
        squared_norms (`torch.Tensor`): ||w_c||^2, shape `(num_components,)`.
        means (`torch.Tensor`): Shape `(num_components,)`.

    Returns:
        `torch.Tensor`: Shape `(num_components,)`.
    """
    if method in (*TRACE_METHODS, "kronecker"):
        sizes = [torch.full((block.num_components,), float(block.weights_per_component())) for block in blocks]
        return means * squared_norms / (2 * torch.cat(sizes).double())
    if method == "gradient":
        layers = means.split([block.num_components for block in blocks])
        tiny = torch.finfo(means.dtype).tiny
        return torch.cat(
            [
                layer / layer.norm().clamp_min(tiny) if isinstance(block, AttentionBlock) else layer
                for block, layer in zip(blocks, layers, strict=True)
            ]
        )
    return means / 2 if method == "fisher" else means


def make_sensitivity(
    method: str,
    blocks: list[Block],
    scores: torch.Tensor,
    moments: SampleMoments | None = None,
    order: torch.Tensor | None = None,
) -> Sensitivity:
    """Splits scores, traces and standard errors into layers of heads and of neurons.

    Args:
        method (`str`): The method.
        blocks (`list[Block]`): All blocks that were asked for, also those with no components left.
        scores (`torch.Tensor`): Shape `(num_components,)`.
        moments (`SampleMoments`, *optional*): Where the scores come from.
        order (`torch.Tensor`, *optional*): Each component's place in its block's order of removal.
    """
    traced = moments if method in TRACE_METHODS else None
    fields: dict[str, torch.Tensor | None] = {
        "heads": scores,
        "head_order": order,
        "head_traces": None if traced is None else traced.mean,
        "head_stderr": None if traced is None else traced.standard_error(),
    }
    counts = [block.num_components for block in blocks]
    lists: dict[str, Any] = {}
    for name, values in fields.items():
        if values is None:
            continue
        parts = list(zip(blocks, values.split(counts), strict=True))
        lists[name] = [part.clone() for block, part in parts if isinstance(block, AttentionBlock)] or None
        name = name.replace("heads", "neurons").replace("head_", "neuron_")
        lists[name] = [part.clone() for block, part in parts if isinstance(block, FeedForwardBlock)] or None
    if method == "fisher" and moments is not None and len(moments.sums):
        num_heads = math.isqrt(len(moments.sums))
        lists["head_interactions"] = moments.sums.view(num_heads, num_heads) / moments.num_examples
    return Sensitivity(method, **lists)
