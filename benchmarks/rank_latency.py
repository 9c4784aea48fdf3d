"""Measures the time of models without whole heads, and of models whose heads all have fewer dimensions.

    python -m benchmarks.rank_latency

Models have the shapes of MiniLM and of four layers of BERT-base, and random weights. Both ways remove the same share
of the encoder's parameters. Nothing else should run on the machine. The command prints a table and writes JSON.
"""

import copy
import json
import platform
import statistics
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertModel, HfArgumentParser

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.efficiency import count_encoder_parameters, count_flops

from . import latency
from .latency import make_inputs, ratios, rounds
from .markdown_table import rank_latency_table


HERE = Path(__file__).parent
# All layers are alike, so that a few of BERT-base have the ratios of all.
MODELS = {
    "MiniLM": latency.MODELS["MiniLM"],
    "BERT-base, 4 layers": {**latency.MODELS["BERT-base"], "num_hidden_layers": 4},
}
SHARES = (0.6, 0.8, 0.9)
BATCH_SIZES, LENGTHS = (1, 32), (64, 128)
HEADS = 12


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    output: str = str(HERE / "rank_latency.json")
    seconds: float = 6.0  # Of measuring for each combination, in at least five rounds.
    threads: int = 2
    models: list[str] = field(default_factory=lambda: list(MODELS))


def without_heads(model: BertModel, share: float) -> BertModel:
    """Copies a model without a share of every layer's heads and neurons."""
    config, layers = model.config, range(model.config.num_hidden_layers)
    heads = round(share * HEADS)
    size = config.hidden_size // HEADS
    # A neuron costs as many parameters as half a dimension of a head, whose projections are four.
    neurons = _neurons(config, share, 2 * size * (HEADS - heads))
    return _pruned(
        model,
        heads={layer: range(heads) for layer in layers},
        neurons={layer: range(neurons, config.intermediate_size) for layer in layers},
    )


def with_lower_ranks(model: BertModel, share: float) -> BertModel:
    """Copies a model without a share of the dimensions of every head, and of every layer's neurons."""
    config, layers = model.config, range(model.config.num_hidden_layers)
    size = config.hidden_size // HEADS
    left = max(round((1 - share) * size), 1)
    gone = [head * size + dim for head in range(HEADS) for dim in range(left, size)]
    neurons = _neurons(config, share, 2 * left * HEADS)
    return _pruned(
        model,
        query_key_dims={layer: gone for layer in layers},
        value_dims={layer: gone for layer in layers},
        neurons={layer: range(neurons, config.intermediate_size) for layer in layers},
    )


def _neurons(config: BertConfig, share: float, others: int) -> int:
    """Neurons of a layer that keeps so many other components of about the same size; a multiple of 8."""
    left = (1 - share) * (2 * config.hidden_size + config.intermediate_size) - others
    return 8 * round(left / 8)


def _pruned(model: BertModel, **removed: dict[int, list[int]]) -> BertModel:
    smaller = copy.deepcopy(model)
    apply_plan(smaller, PruningPlan.for_model(smaller, **removed))
    return smaller


def main() -> None:
    """Measures, prints and writes."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    rows = []
    with torch.inference_mode():
        for name, dtype in product(args.models, (torch.float32, torch.bfloat16)):
            dense = BertModel(BertConfig(num_attention_heads=HEADS, vocab_size=1000, **MODELS[name])).to(dtype).eval()
            models = {("dense", 0.0): dense}
            for share in SHARES:
                models["heads", share] = without_heads(dense, share)
                models["ranks", share] = with_lower_ranks(dense, share)
            for batch_size, length in product(BATCH_SIZES, LENGTHS):
                inputs = make_inputs(batch_size, length)
                times = rounds(models, inputs, args.seconds)
                for (way, share), model in list(models.items())[1:]:
                    row = {"model": name, "dtype": str(dtype).removeprefix("torch."), "way": way, "share": share}
                    row |= {"batch_size": batch_size, "length": length}
                    row["kept"] = count_encoder_parameters(model) / count_encoder_parameters(dense)
                    row["flops"] = count_flops(model, inputs) / count_flops(dense, inputs)
                    row |= ratios(times[way, share], times["dense", 0.0])
                    rows.append({**row, "dense_ms": 1000 * statistics.median(times["dense", 0.0])})
                print(f"{name} {dtype} {batch_size} x {length}", file=sys.stderr)
    machine = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": platform.processor() or platform.machine(),
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(rank_latency_table(rows))
    Path(args.output).write_text(json.dumps({"rows": rows, "machine": machine}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
