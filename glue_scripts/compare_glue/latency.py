"""How fast the pruned models of a comparison are."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.efficiency import compare_latency
from hap_transformers.files import write_text

from .base_models import BASE_MODELS
from .cells import Cell


# Enough work for matrix products to take most of the time, and few enough tokens to be a usual text.
EXAMPLES, TOKENS = 8, 64


def structure(cell: Cell) -> str:
    """Returns what every layer has left as JSON: the speed of cells of one base model depends on it alone.

    These are heads, neurons, implants' ranks and, where heads got narrower, their ranks.
    """
    ranks = [cell["ranks"]] if "ranks" in cell else []
    return json.dumps([cell["heads"], cell["neurons"], cell["implants"], *ranks])


def measure_latencies(cells: Iterable[Cell], file: Path) -> dict[str, float]:
    """Times a forward pass of every structure, and divides by the time of the dense model in the same rounds.

    Args:
        cells (`Iterable[dict]`): The cells, of one base model.
        file (`Path`): File of latencies. Those that it has are not measured again.

    Returns:
        `dict[str, float]`: By [`structure`], seconds over seconds, for 8 examples of 64 tokens in float32, on the
            machine and threads that run this.
    """
    cells = list(cells)
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [found for found in dict.fromkeys(structure(cell) for cell in cells) if found not in known]
    if missing:
        base = BASE_MODELS[cells[0]["model"]].folder(file.parent / "downloads")
        dense = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(base))
        tokens = min(TOKENS, dense.config.max_position_embeddings)
        ids = torch.randint(5, dense.config.vocab_size, (EXAMPLES, tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for current in tqdm(missing, "Latencies", disable=None if missing else True):
        seconds = compare_latency({"dense": dense, "pruned": _pruned(dense, current)}, inputs)
        known[current] = seconds["pruned"] / seconds["dense"]
        write_text(file, json.dumps(known, indent=0) + "\n")
    return known


def _pruned(dense: PreTrainedModel, structure: str) -> PreTrainedModel:
    """A copy of a dense model with a structure; which components are removed makes no difference to the speed."""
    heads, neurons, implants, *ranks = json.loads(structure)
    size = dense.config.hidden_size // dense.config.num_attention_heads
    removed = {"neurons": _beyond(neurons, dense.config.intermediate_size)}
    if ranks:
        for kind, layers in ranks[0].items():
            gone = {i: _beyond_in_each(left, size) for i, left in enumerate(layers)}
            removed[kind] = {layer: numbers for layer, numbers in gone.items() if numbers}
    else:
        removed["heads"] = _beyond(heads, dense.config.num_attention_heads)
    given = {layer: rank for layer, rank in enumerate(implants) if rank}
    pruned = copy.deepcopy(dense)
    apply_plan(pruned, PruningPlan.for_model(dense, implants=given, **removed))
    return pruned


def _beyond(left: list[int], total: int) -> dict[int, range]:
    """By layer, the components after the first ones, which are left."""
    return {layer: range(count, total) for layer, count in enumerate(left) if count < total}


def _beyond_in_each(left: list[int], size: int) -> list[int]:
    """The dimensions of a layer that are not among the first ones, which are left, of their head."""
    return [head * size + place for head, count in enumerate(left) for place in range(count, size)]
