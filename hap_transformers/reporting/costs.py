"""What a dense and a pruned model cost, as `results.json` has it and tables show it."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..efficiency import count_encoder_parameters, count_flops, count_parameters
from .wording import COSTS as CARD_COSTS


COSTS = {**CARD_COSTS, "bytes": "size on disk"}


def costs_of(
    models: Mapping[str, PreTrainedModel],
    inputs: Mapping[str, torch.Tensor] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Parameters, bytes, FLOPs and milliseconds of each model, by the names in `COSTS`.

    Args:
        models (`Mapping[str, PreTrainedModel]`): The models by phase.
        inputs (`Mapping[str, torch.Tensor]`, *optional*): The batch whose FLOPs are counted.
        seconds (`Mapping[str, float]`, *optional*): What a forward pass of each model takes.
    """
    costs: dict[str, dict[str, float]] = {
        "parameters": {name: count_parameters(model) for name, model in models.items()},
        "encoder_parameters": {name: count_encoder_parameters(model) for name, model in models.items()},
        "bytes": {name: model.get_memory_footprint(return_buffers=False) for name, model in models.items()},
    }
    if inputs is not None:
        costs["flops"] = {name: count_flops(model, inputs) for name, model in models.items()}
    if seconds is not None:
        costs["latency_ms"] = {name: 1000 * value for name, value in seconds.items()}
    return costs


def cost_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, float]]:
    """Every cost in results: its label, dense and pruned in a unit that suits it, and the share that is left."""
    return [
        (label, _short(key, dense), _short(key, pruned), pruned / dense)
        for key, label in COSTS.items()
        if key in results
        for dense, pruned in [(results[key]["dense"], results[key]["pruned"])]
    ]


def _short(key: str, value: float) -> str:
    if key == "bytes":
        return f"{value / 1e6:.1f} MB"
    if key == "flops":
        return f"{value / 1e9:.2f} G"
    return f"{value:,.1f}" if key == "latency_ms" else f"{value:,}"
