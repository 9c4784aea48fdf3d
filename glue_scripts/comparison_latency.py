"""How fast the pruned models of a comparison are."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from comparison_table import Cell
from demo_data import demo_model_path
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.efficiency import compare_latency
from hap_transformers.files import write_text


EXAMPLES, TOKENS = 8, 64


def structure(cell: Cell) -> str:
    """What a cell's speed depends on: the heads, neurons and implants' ranks of every layer."""
    return json.dumps([cell["heads"], cell["neurons"], cell["implants"]])


def measure_latencies(cells: Iterable[Cell], file: Path) -> dict[str, float]:
    """Times a forward pass of every structure over that of the dense model in the same rounds.

    Args:
        cells (`Iterable[dict]`): The cells.
        file (`Path`): Where latencies are kept; those that are there are not measured again.

    Returns:
        `dict[str, float]`: By [`structure`], seconds over seconds, for 8 examples of 64 tokens in float32, on the
            machine and threads that run this.
    """
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [own for own in dict.fromkeys(structure(cell) for cell in cells) if own not in known]
    if missing:
        dense = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(demo_model_path()))
        tokens = min(TOKENS, dense.config.max_position_embeddings)
        ids = torch.randint(5, dense.config.vocab_size, (EXAMPLES, tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for own in tqdm(missing, "Latencies", disable=None if missing else True):
        *kept, ranks = json.loads(own)
        pruned = copy.deepcopy(dense)
        totals = dense.config.num_attention_heads, dense.config.intermediate_size
        # Which of them are removed makes no difference to the speed.
        heads, neurons = (
            {layer: range(left, total) for layer, left in enumerate(layers) if left < total}
            for layers, total in zip(kept, totals, strict=True)
        )
        implants = {layer: rank for layer, rank in enumerate(ranks) if rank}
        apply_plan(pruned, PruningPlan.for_model(dense, heads=heads, neurons=neurons, implants=implants))
        seconds = compare_latency({"dense": dense, "pruned": pruned}, inputs)
        known[own] = seconds["pruned"] / seconds["dense"]
        write_text(file, json.dumps(known, indent=0) + "\n")
    return known
