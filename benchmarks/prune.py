"""Measures what pruning costs, phase by phase: scoring, planning, surgery and refit on 512 MRPC pairs.

    python -m benchmarks.prune --data_dir ../shared/glue

Ratios within the run show whether time grows faster than layers or examples. Nothing else should run on the machine.
The command prints tables and writes JSON.
"""

import json
import platform
import statistics
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, PreTrainedModel

from hap_transformers import apply_plan, estimate_sensitivity, plan_pruning, reconstruct

from . import workloads
from .markdown_table import phases_table, table


HERE = Path(__file__).parent
PHASES = ("score", "plan", "surgery", "refit")
# Seconds that all phases together should take at most on two cores: little beside fine-tuning.
TARGETS = {"MiniLM": 60.0, "BERT-base": 360.0}
# Time over that of two workloads of half the size: 1 is growth in proportion, the rest is noise.
LINEAR = 1.05


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "prune.json")
    examples: int = 512
    ratio: float = 0.6
    repeats: int = 3
    base: bool = True


def prune(model: PreTrainedModel, batches: workloads.Batches, ratio: float) -> dict[str, float]:
    """Prunes a copy of a model and returns the seconds of each phase."""
    smaller, times = deepcopy(model), [time.perf_counter()]
    sensitivity = estimate_sensitivity(smaller, batches, progress=False)
    times.append(time.perf_counter())
    plan = plan_pruning(sensitivity, smaller, ratio=ratio)
    times.append(time.perf_counter())
    apply_plan(smaller, plan)
    times.append(time.perf_counter())
    reconstruct(smaller, model, batches, progress=False)
    times.append(time.perf_counter())
    return {phase: after - before for phase, before, after in zip(PHASES, times[:-1], times[1:], strict=True)}


def bert_base(vocabulary: int) -> PreTrainedModel:
    """Makes a model of BERT-base's size with random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=vocabulary)).eval()


def growth(name: str, whole: list[dict], half: list[dict]) -> dict:
    """Compares all phases of a workload with twice those of a workload of half the size, in the same rounds."""
    ratios = [sum(a.values()) / (2 * sum(b.values())) for a, b in zip(whole, half, strict=True)]
    values = [statistics.median(sum(run.values()) for run in runs) for runs in (whole, half)]
    spread = {"ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
    return {"measure": name, "target": LINEAR, **spread, "values": [values[0], 2 * values[1]], "unit": "s"}


def main() -> None:
    """Measures everything, prints the tables, writes JSON."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    batches = workloads.load_batches(args.data_dir, args.examples // workloads.BATCH_SIZE)
    model, half = workloads.load_model(), workloads.load_model(num_hidden_layers=3)
    prune(model, batches[:1], args.ratio)  # Loads the kernels.
    runs: dict[str, list[dict]] = {"whole": [], "half the examples": [], "half the layers": []}
    for repeat in range(args.repeats):
        runs["whole"].append(prune(model, batches, args.ratio))
        runs["half the examples"].append(prune(model, batches[::2], args.ratio))
        runs["half the layers"].append(prune(half, batches, args.ratio))
        print(f"round {repeat + 1} of {args.repeats}: {runs['whole'][-1]}", file=sys.stderr)
    phases = [{"model": "MiniLM", "target": TARGETS["MiniLM"], "runs": runs["whole"]}]
    rows = [
        growth("all phases, 6 layers / 2 x 3 layers", runs["whole"], runs["half the layers"]),
        growth(
            f"all phases, {args.examples} / 2 x {args.examples // 2} pairs", runs["whole"], runs["half the examples"]
        ),
    ]
    if args.base:
        base = bert_base(model.config.vocab_size)
        phases.append(
            {"model": "BERT-base", "target": TARGETS["BERT-base"], "runs": [prune(base, batches, args.ratio)]}
        )
    print(phases_table(phases), table(rows), sep="\n\n")
    result = {
        "phases": phases,
        "rows": rows,
        "settings": {"examples": args.examples, "ratio": args.ratio, "repeats": args.repeats},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()},
    }
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
