"""Measures what bfloat16 saves in a refit and in the tuning of layers, and what it costs in distance.

    python -m benchmarks.refit_precision --data_dir ../shared/glue

MiniLM and a model of BERT-base's size with random weights are pruned by magnitude, then refitted and tuned in either
precision in turn. Distances from the dense model are of MiniLM's last hidden states on pairs that the refit has not
seen. The command prints a table and writes JSON.
"""

import json
import statistics
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser, PreTrainedModel

from hap_transformers import apply_plan, estimate_sensitivity, plan_pruning, reconstruct, tune_layers
from hap_transformers.tokens import relative_distance, valid_tokens

from . import workloads
from .markdown_table import table
from .prune import bert_base


HERE = Path(__file__).parent
PRECISIONS = ("no", "bf16")
# Training in bf16 should not wait for float32.
TIME_TARGET = 0.75
DISTANCE_TARGET = 1.02


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "refit_precision.json")
    examples: int = 256
    base_examples: int = 64
    ratio: float = 0.8
    repeats: int = 3


def refitted(
    model: PreTrainedModel, dense: PreTrainedModel, batches: workloads.Batches, precision: str
) -> tuple[PreTrainedModel, dict[str, float]]:
    """A refitted and tuned copy of a pruned model, and the processor's seconds of either."""
    smaller, times = deepcopy(model), [time.process_time()]
    for fit in (reconstruct, tune_layers):
        fit(smaller, dense, batches, precision=precision, progress=False)
        times.append(time.process_time())
    return smaller, {"refit": times[1] - times[0], "tuning": times[2] - times[1]}


@torch.no_grad()
def distance(model: PreTrainedModel, dense: PreTrainedModel, batches: workloads.Batches) -> float:
    """The mean relative squared distance of the last hidden states."""
    found = []
    for batch in batches:
        ours, wanted = (
            valid_tokens(one.base_model(**batch).last_hidden_state, batch["attention_mask"]) for one in (model, dense)
        )
        found.append(float(relative_distance(ours, wanted)))
    return statistics.mean(found)


def measure(
    model: PreTrainedModel, batches: workloads.Batches, unseen: workloads.Batches, args: Arguments
) -> list[dict[str, dict[str, float]]]:
    """Seconds and distances by precision, a round each."""
    smaller = deepcopy(model)
    apply_plan(smaller, plan_pruning(estimate_sensitivity(model, [], "magnitude"), model, ratio=args.ratio))
    refitted(smaller, model, batches[:1], "bf16")  # Loads the kernels.
    rounds = []
    for _ in range(args.repeats):
        found = {}
        for precision in PRECISIONS:
            fitted, figures = refitted(smaller, model, batches, precision)
            found[precision] = figures | ({"distance": distance(fitted, model, unseen)} if unseen else {})
        rounds.append(found)
        print(found, file=sys.stderr)
    return rounds


def compared(name: str, measure: str, rounds: list[dict], target: float) -> dict:
    """A measure in bfloat16 over that in float32."""
    ratios = [found["bf16"][measure] / found["no"][measure] for found in rounds]
    values = [statistics.median(found[precision][measure] for found in rounds) for precision in ("bf16", "no")]
    spread = {"ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
    unit = "s" if measure != "distance" else "%"
    return {"measure": f"{name}, {measure}", "target": target, **spread, "unit": unit} | {
        "values": values if unit == "s" else [100 * value for value in values]
    }


def main() -> None:
    """Measures everything, prints the table, writes JSON."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    count, of_base = (number // workloads.BATCH_SIZE for number in (args.examples, args.base_examples))
    batches = [
        {name: value for name, value in batch.items() if name != "labels"}
        for batch in workloads.load_batches(args.data_dir, 2 * count)
    ]
    model = workloads.load_model()
    rounds = measure(model, batches[:count], batches[count:], args)
    rows = [compared("MiniLM", name, rounds, TIME_TARGET) for name in ("refit", "tuning")]
    rows.append(compared("MiniLM", "distance", rounds, DISTANCE_TARGET))
    rounds = measure(bert_base(model.config.vocab_size), batches[:of_base], [], args)
    rows += [compared("BERT-base", name, rounds, TIME_TARGET) for name in ("refit", "tuning")]
    print(table(rows))
    settings = {name: vars(args)[name] for name in ("examples", "base_examples", "ratio", "repeats")}
    result = {"rows": rows, "settings": settings, "threads": torch.get_num_threads()}
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
