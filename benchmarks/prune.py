"""Measures what pruning costs, phase by phase: alignment, scoring, planning, surgery and refit on 512 MRPC pairs.

    python -m benchmarks.prune --data_dir ../shared/glue

Ratios within the run show whether time grows faster than layers or examples. Nothing else should run on the machine.
The command prints tables and writes JSON.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, PreTrainedModel

from hap_transformers import align_heads, apply_plan, estimate_sensitivity, plan_pruning, reconstruct

from . import workloads
from .markdown_table import phases_table, table


HERE = Path(__file__).parent
PHASES = ("align", "score", "plan", "surgery", "refit")
WHOLE_HEADS, DIMENSIONS = ("heads", "neurons"), ("query_key_dims", "value_dims", "neurons")
# Time of pruning dimensions of heads over that of pruning whole heads.
DIMENSIONS_TARGET = 1.3
# Time of scoring over that of a forward and a backward pass over the same examples.
SCORING_TARGET = 1.0
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


def prune(
    model: PreTrainedModel, batches: workloads.Batches, ratio: float, kinds: Sequence[str] = DIMENSIONS
) -> dict[str, float]:
    """Prunes a copy of a model and returns the seconds of each phase."""
    smaller, times = deepcopy(model), [time.perf_counter()]
    if kinds == DIMENSIONS:
        align_heads(smaller, batches, progress=False)
    times.append(time.perf_counter())
    sensitivity = estimate_sensitivity(smaller, batches, components=kinds, progress=False)
    times.append(time.perf_counter())
    plan = plan_pruning(sensitivity, smaller, ratio=ratio)
    times.append(time.perf_counter())
    apply_plan(smaller, plan)
    times.append(time.perf_counter())
    reconstruct(smaller, model, batches, progress=False)
    times.append(time.perf_counter())
    return {phase: after - before for phase, before, after in zip(PHASES, times[:-1], times[1:], strict=True)}


def train_once(model: PreTrainedModel, batches: workloads.Batches) -> dict[str, float]:
    """Returns the seconds of a forward and a backward pass over the batches, as of an epoch of training."""
    start = time.perf_counter()
    for batch in batches:
        model(**batch).loss.backward()
        model.zero_grad()
    return {"forward+backward": time.perf_counter() - start}


def scoring_of(runs: list[dict]) -> list[dict]:
    """What runs spend on scores, with the basis that the scores are of."""
    return [{phase: run[phase] for phase in ("align", "score")} for run in runs]


def bert_base(vocabulary: int) -> PreTrainedModel:
    """Makes a model of BERT-base's size with random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=vocabulary)).eval()


def compared(name: str, runs: list[dict], others: list[dict], times: int, target: float) -> dict:
    """Compares all phases of a workload with so many times those of another one, in the same rounds."""
    ratios = [sum(a.values()) / (times * sum(b.values())) for a, b in zip(runs, others, strict=True)]
    values = [statistics.median(sum(run.values()) for run in each) for each in (runs, others)]
    spread = {"ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
    return {"measure": name, "target": target, **spread, "values": [values[0], times * values[1]], "unit": "s"}


def main() -> None:
    """Measures everything, prints the tables, writes JSON."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    batches = workloads.load_batches(args.data_dir, args.examples // workloads.BATCH_SIZE)
    model, half = workloads.load_model(), workloads.load_model(num_hidden_layers=3)
    prune(model, batches[:1], args.ratio)  # Loads the kernels.
    runs: dict[str, list[dict]] = {"whole": [], "half the examples": [], "half the layers": [], "whole heads": []}
    passes: list[dict] = []
    for repeat in range(args.repeats):
        runs["whole"].append(prune(model, batches, args.ratio))
        passes.append(train_once(model, batches))
        runs["whole heads"].append(prune(model, batches, args.ratio, WHOLE_HEADS))
        runs["half the examples"].append(prune(model, batches[::2], args.ratio))
        runs["half the layers"].append(prune(half, batches, args.ratio))
        print(f"round {repeat + 1} of {args.repeats}: {runs['whole'][-1]}", file=sys.stderr)
    phases = [
        {"model": "MiniLM", "target": TARGETS["MiniLM"], "runs": runs["whole"]},
        {"model": "MiniLM, whole heads", "target": TARGETS["MiniLM"], "runs": runs["whole heads"]},
    ]
    pairs = f"all phases, {args.examples} / 2 x {args.examples // 2} pairs"
    rows = [
        compared("all phases, 6 layers / 2 x 3 layers", runs["whole"], runs["half the layers"], 2, LINEAR),
        compared(pairs, runs["whole"], runs["half the examples"], 2, LINEAR),
        compared("all phases, dimensions / whole heads", runs["whole"], runs["whole heads"], 1, DIMENSIONS_TARGET),
        compared("scoring dimensions / forward+backward", scoring_of(runs["whole"]), passes, 1, SCORING_TARGET),
        compared("scoring heads / forward+backward", scoring_of(runs["whole heads"]), passes, 1, SCORING_TARGET),
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
