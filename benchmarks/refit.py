"""Measures what more examples bring to a refit, and what memory and time they take.

    python -m benchmarks.refit --data_dir ../shared/glue

MiniLM is fine-tuned on a part of each task's training split. It is pruned once by the scores of 1,024 examples, and
refitted on more and more. The divergence from the dense model is measured on the part that was held out. Memory and
seconds are those of processes of their own, on texts of random tokens. The command prints tables and writes JSON.
"""

import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, HfArgumentParser, PreTrainedModel

from glue_scripts.compare_glue.job import Job
from hap_transformers import HapConfig, PruningPlan, apply_plan, estimate_sensitivity, plan_pruning, reconstruct
from hap_transformers.data.calibration import calibration_batches
from hap_transformers.refit.dense_copy import sharing_copy

from .markdown_table import refit_costs_table, refit_examples_table
from .memory import peak_bytes
from .workloads import BATCH_SIZE, load_model


HERE = Path(__file__).parent
COUNTS = (512, 1024, 2048, 4096)
RATIOS = (0.6, 0.8)
# Eight times as many examples: the limits on what they may take, over the first.
COST_COUNTS = (512, 4096)
MOST_MEMORY, LINEAR = 1.1, 1.05
# Tokens of a text, about as many as a sentence has.
LENGTH = 32


@dataclass
class Arguments:
    """What to measure, and where results go."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "refit.json")
    dense_dir: str = "build/refit"
    tasks: list[str] = field(default_factory=lambda: ["mrpc", "sst2"])
    seeds: int = 1
    repeats: int = 2
    child: int = field(default=0, metadata={"help": "refit on so many texts in this process, and print what it took"})


def divergence(model: PreTrainedModel, dense: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean divergence of a classifier's predictions from the dense model's."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logs = [network(**batch).logits.log_softmax(-1) for network in (model, dense)]
            total += F.kl_div(*logs, log_target=True, reduction="sum").item()
            count += len(logs[0])
    return total / count


def measure_task(job: Job) -> list[dict]:
    """Refits the pruned models of one task and seed on ever more examples; one row a ratio and count."""
    config, collate = HapConfig(), DataCollatorWithPadding(job.tokenizer)
    dense = job.dense().eval()
    words = [name for name in job.train.column_names if name in job.tokenizer.model_input_names]
    train, held_out = job.train.select_columns(words), job.evaluated.select_columns(words)
    evaluated = list(calibration_batches(held_out, len(held_out), 0, BATCH_SIZE, collate))
    batches = list(calibration_batches(train, COUNTS[-1], job.seed, BATCH_SIZE, collate))
    scores = estimate_sensitivity(dense, batches, max_examples=config.max_examples, progress=False)
    rows = []
    for ratio in RATIOS:
        plan = plan_pruning(scores, dense, ratio=ratio)
        for count in (count for count in COUNTS if count <= len(train)):
            kl, seconds = refitted(dense, plan, batches[: count // BATCH_SIZE], evaluated)
            row = {"task": job.name, "seed": job.seed, "ratio": ratio, "examples": count, "kl": kl, "seconds": seconds}
            rows.append(row)
            print(row, file=sys.stderr)
    return rows


def refitted(
    dense: PreTrainedModel, plan: PruningPlan, batches: list[dict], evaluated: list[dict]
) -> tuple[float, float]:
    """Prunes and refits a copy of a model; returns its divergence from it, and the refit's seconds."""
    model = copy.deepcopy(dense)
    apply_plan(model, plan)
    start = time.process_time()
    reconstruct(model, dense, batches, progress=False)
    seconds = time.process_time() - start
    return divergence(model, dense, evaluated), seconds


def measure_here(count: int) -> dict[str, float]:
    """Refits MiniLM on texts of random tokens in this process, which must be new."""
    model = load_model()
    dense = sharing_copy(model)
    layers = range(model.config.num_hidden_layers)
    plan = {"heads": {layer: range(6) for layer in layers}, "neurons": {layer: range(768) for layer in layers}}
    apply_plan(model, PruningPlan.for_model(model, **plan))
    generator = torch.Generator().manual_seed(0)

    def batches():
        for _ in range(count // BATCH_SIZE):
            ids = torch.randint(1000, 30000, (BATCH_SIZE, LENGTH), generator=generator)
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    start = time.process_time()
    reconstruct(model, dense, batches(), progress=False)
    return {"examples": count, "seconds": time.process_time() - start, "peak": peak_bytes()}


def measure(count: int) -> dict[str, float]:
    """Refits in a new process."""
    command = [sys.executable, "-m", "benchmarks.refit", "--child", str(count)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent).stdout
    return json.loads(printed.splitlines()[-1])


def growth(rounds: list[list[dict[str, float]]]) -> list[dict]:
    """Memory and seconds of the many examples over those of the few, in the same round."""
    rows = []
    times = COST_COUNTS[1] / COST_COUNTS[0]
    for name, share, target in (("peak", 1.0, MOST_MEMORY), ("seconds", times, LINEAR)):
        ratios = [many[name] / (share * few[name]) for few, many in rounds]
        values = [statistics.median(run[place][name] for run in rounds) for place in (0, 1)]
        spread = {"ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
        rows.append({"measure": name, "target": target, "few": values[0], "many": values[1], **spread})
    return rows


def main() -> None:
    """Measures, prints and writes."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.child:
        print(json.dumps(measure_here(args.child)))
        return
    rows: list[dict] = []
    for seed, task in product(range(args.seeds), args.tasks):
        rows += measure_task(Job(task, seed, args.data_dir, args.dense_dir, fold=True))
    costs = growth([[measure(count) for count in COST_COUNTS] for _ in range(args.repeats)])
    print(refit_examples_table(rows), refit_costs_table(costs), sep="\n\n")
    result = {
        "rows": rows,
        "costs": costs,
        "settings": {"costs_of": list(COST_COUNTS), "tokens": LENGTH, "seeds": args.seeds, "repeats": args.repeats},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()},
    }
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
