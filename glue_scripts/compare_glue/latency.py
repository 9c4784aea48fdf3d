"""How fast the pruned models of a comparison are."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.data.demo import demo_model_path
from hap_transformers.efficiency import compare_latency
from hap_transformers.files import write_text

from .cells import Cell


# Enough work for matrix products to take most of the time, and few enough tokens to be a usual text.
EXAMPLES, TOKENS = 8, 64


def structure(cell: Cell) -> str:
    """Returns the heads, neurons and implants' ranks of every layer as JSON: a cell's speed depends on them alone."""
    return json.dumps([cell["heads"], cell["neurons"], cell["implants"]])


def measure_latencies(cells: Iterable[Cell], file: Path) -> dict[str, float]:
    """Times a forward pass of every structure, and divides by the time of the dense model in the same rounds.

    Args:
        cells (`Iterable[dict]`): The cells.
        file (`Path`): File of latencies. Those that it has are not measured again.

    Returns:
        `dict[str, float]`: By [`structure`], seconds over seconds, for 8 examples of 64 tokens in float32, on the
            machine and threads that run this.
    """
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [found for found in dict.fromkeys(structure(cell) for cell in cells) if found not in known]
    if missing:
        dense = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(demo_model_path()))
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
    *kept, ranks = json.loads(structure)
    totals = dense.config.num_attention_heads, dense.config.intermediate_size
    heads, neurons = (
        {layer: range(left, total) for layer, left in enumerate(counts) if left < total}
        for counts, total in zip(kept, totals, strict=True)
    )
    implants = {layer: rank for layer, rank in enumerate(ranks) if rank}
    pruned = copy.deepcopy(dense)
    apply_plan(pruned, PruningPlan.for_model(dense, heads=heads, neurons=neurons, implants=implants))
    return pruned
