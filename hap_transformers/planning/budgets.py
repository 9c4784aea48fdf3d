"""What heads and neurons cost, in each currency that a budget can be in."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from ..components.groups import AttentionBlock, Block, attention_blocks, feed_forward_blocks, layers
from ..components.structure import recorded_structure
from ..efficiency import count_encoder_parameters, count_flops, count_flops_by_module, count_parameters
from .latency_table import LatencyTable


BUDGETS = ("params", "flops", "latency", "heads")


@dataclass
class Budget:
    """The costs of a model's encoder in one currency.

    Args:
        dense (`float`): What the encoder costs before any pruning.
        now (`float`): What it costs as it is.
        costs (`list[Callable[[int], float]]`): For each block, the cost of so many of its components.
        outside (`float`): What the rest of the model costs.
    """

    dense: float
    now: float
    costs: list[Callable[[int], float]]
    outside: float


def make_budget(
    name: str,
    model: PreTrainedModel,
    inputs: Mapping[str, Any] | None = None,
    latency_table: LatencyTable | None = None,
) -> Budget:
    """The costs of a model in one currency.

    Args:
        name (`str`): One of `BUDGETS`.
        model (`PreTrainedModel`): The model; it is only looked at.
        inputs (`Mapping[str, Any]`, *optional*): The batch whose FLOPs count.
        latency_table (`LatencyTable`, *optional*): Seconds by heads and neurons.

    Raises:
        ValueError: If the currency is unknown, or `inputs` or `latency_table` are missing or do not fit.
    """
    if name == "latency":
        return _latency_budget(model, latency_table)
    if name not in BUDGETS:
        raise ValueError(f"Unknown budget '{name}'; choose one of {', '.join(BUDGETS)}.")
    if name == "flops" and inputs is None:
        raise ValueError("budget='flops' depends on the length of inputs; pass a batch as `inputs`.")
    original = dense_like(model, model.device if name == "flops" else torch.device("meta"))
    blocks = all_blocks(original)
    if name == "heads":
        own = [float(isinstance(block, AttentionBlock)) for block in blocks]
        dense = sum(cost * block.num_components for cost, block in zip(own, blocks, strict=True))
        whole = float(sum(block.num_components for block in attention_blocks(model)))
    elif name == "params":
        own = [float(block.parameters_per_component()) for block in blocks]
        dense, whole = float(count_encoder_parameters(original)), count_parameters(model)
    else:
        assert inputs is not None  # Else refused above: what is left is "flops".
        flops = count_flops_by_module(original, inputs)
        own = [_flops(block, flops) / block.num_components for block in blocks]
        dense, whole = float(sum(flops.get(layer, 0) for layer in set(layers(original)))), count_flops(model, inputs)
    present = zip(own, blocks, all_blocks(model), strict=True)
    now = dense - sum(cost * (before.num_components - block.num_components) for cost, before, block in present)
    return Budget(dense, now, [partial(mul, cost) for cost in own], whole - now)


def all_blocks(model: PreTrainedModel) -> list[Block]:
    """Attention blocks, then feed-forward blocks."""
    return [*attention_blocks(model), *feed_forward_blocks(model)]


def dense_counts(model: PreTrainedModel) -> list[int]:
    """Components that each of `all_blocks` had before any pruning."""
    return [block.num_components for block in all_blocks(dense_like(model, torch.device("meta")))]


def dense_like(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A model whose layers have the sizes that a pruned one's had, with other weights; a dense model itself.

    It is of the class that Transformers has: what is around the layers, or how the model was loaded, may differ.
    """
    if recorded_structure(model.config) is None and not getattr(model.config, "pruned_heads", None):
        return model
    config = deepcopy(model.config)
    config.pruned_heads = {}
    if recorded_structure(config) is not None:
        del config.quantization_config
    shipped = (base for base in type(model).__mro__ if base.__module__.startswith("transformers."))
    # Classes of one's own may have only a base without layers there.
    shipped = (base for base in shipped if issubclass(base, PreTrainedModel) and base.forward is not Module.forward)
    with device:
        return next(shipped, type(model))(config)


def _flops(block: Block, flops: Mapping[torch.nn.Module, int]) -> int:
    """FLOPs of all that gets smaller with a block: its projections and, for attention, what lies between them."""
    modules: set[torch.nn.Module] = {projection.module for projection in block.sliced}
    if isinstance(block, AttentionBlock):
        modules = {block.attention} | (modules - set(block.attention.modules()))
    return sum(flops.get(module, 0) for module in modules)


def _latency_budget(model: PreTrainedModel, table: LatencyTable | None) -> Budget:
    if table is None:
        raise ValueError(
            "budget='latency' needs seconds measured on your device; pass latency_table=LatencyTable.measure(...)."
        )
    blocks, dense = all_blocks(model), dense_counts(model)
    table.validate(model, dense)
    costs: list[Callable[[int], float]] = [
        table.head_cost if isinstance(block, AttentionBlock) else table.neuron_cost for block in blocks
    ]
    return Budget(
        dense=sum(cost(count) for cost, count in zip(costs, dense, strict=True)),
        now=sum(cost(block.num_components) for cost, block in zip(costs, blocks, strict=True)),
        costs=costs,
        outside=table.outside,
    )
