"""What a dense and a pruned model cost, as `results.json` has it and tables show it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..components.groups import by_kind, find_groups, layers
from ..components.record import recorded_structure
from ..efficiency import count_encoder_parameters, count_flops, count_parameters
from ..surgery.shared_weights import counted_twice, shared_by_pairs
from ..vocabulary.plan import VocabularyPlan
from .wording import COSTS as CARD_COSTS
from .wording import label_of


COSTS = {**CARD_COSTS, "bytes": "size on disk"}
# Parts of a model beside the kinds of component.
EMBEDDINGS, REST, OTHERS = "embeddings", "rest of the layers", "everything else"


def costs_of(
    models: Mapping[str, PreTrainedModel],
    inputs: Mapping[str, torch.Tensor] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Parameters, bytes, FLOPs and milliseconds of each model, by the names in `COSTS`.

    Beside them, `parts` has parameters by part, and `pruned_before` says whether the first model is no dense one.

    Args:
        models (`Mapping[str, PreTrainedModel]`): The models by phase.
        inputs (`Mapping[str, torch.Tensor]`, *optional*): The batch whose FLOPs are counted.
        seconds (`Mapping[str, float]`, *optional*): What a forward pass of each model takes.
    """
    first = next(iter(models.values()))
    costs: dict[str, Any] = {
        "parameters": {name: count_parameters(model) for name, model in models.items()},
        "encoder_parameters": {name: count_encoder_parameters(model) for name, model in models.items()},
        "bytes": {name: model.get_memory_footprint(return_buffers=False) for name, model in models.items()},
    }
    costs["parts"] = parts_of(models)
    costs["pruned_before"] = recorded_structure(first.config) is not None
    if inputs is not None:
        costs["flops"] = {name: count_flops(model, inputs) for name, model in models.items()}
    if seconds is not None:
        costs["latency_ms"] = {name: 1000 * value for name, value in seconds.items()}
    return costs


def parts_of(models: Mapping[str, PreTrainedModel]) -> dict[str, dict[str, int]]:
    """The parameters of each model by part: embeddings, components by kind, the rest of the layers, and all else.

    Args:
        models (`Mapping[str, PreTrainedModel]`): The models by phase. Components are of the kinds of the last one.
    """
    *_, last = models.values()
    kinds = [kind.name for kind in by_kind(find_groups(last)) if not kind.outside]
    return {name: _parts(model, kinds) for name, model in models.items()}


def _parts(model: PreTrainedModel, kinds: Sequence[str]) -> dict[str, int]:
    encoder, inside = count_encoder_parameters(model), {p for layer in layers(model) for p in layer.parameters()}
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    found = {EMBEDDINGS: sum(p.numel() for p in {p for table in tables for p in table.parameters()} - inside)}
    for kind, groups in by_kind(find_groups(model, kinds)).items():
        owned = sum(group.num_components * group.parameters_per_component() for group in groups)
        twice = counted_twice(shared_by_pairs(groups), [group.num_components for group in groups])
        found[kind.name] = owned - round(twice)
    found[REST] = encoder + found[EMBEDDINGS] - sum(found.values())
    return {**found, OTHERS: count_parameters(model) - sum(found.values())}


def add_trimmed(results: Mapping[str, Any], vocabulary: VocabularyPlan, dense: PreTrainedModel) -> None:
    """Adds to the costs of a dense model the tokens that trimming its vocabulary has taken.

    Args:
        results (`Mapping[str, Any]`): What [`costs_of`] gave; changed in place.
        vocabulary (`VocabularyPlan`): What was trimmed.
        dense (`PreTrainedModel`): The model after trimming.
    """
    fewer = vocabulary.parameters["before"] - vocabulary.parameters["after"]
    results["parameters"]["dense"] += fewer
    results["bytes"]["dense"] += fewer * dense.dtype.itemsize
    results["parts"]["dense"][EMBEDDINGS] += fewer


def part_rows(results: Mapping[str, Any]) -> list[tuple[str, int, int, float]]:
    """Every part of a model in results: its label, its parameters dense and pruned, and the share that is left."""
    parts = results.get("parts") or {}
    labelled = {name: label_of(name) for name in parts.get("dense", ())}
    return [
        (
            label,
            parts["dense"][name],
            parts["pruned"].get(name, 0),
            parts["pruned"].get(name, 0) / parts["dense"][name],
        )
        for name, label in labelled.items()
        if parts["dense"][name]
    ]


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
    return f"{value:,.1f}" if key in ("latency_ms", "tokens_per_second") else f"{value:,}"
