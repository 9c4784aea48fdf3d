"""Measures what it changes that eliminations remove several neurons at once: order, KL after the refit, and time.

    python -m benchmarks.elimination --data_dir ../shared/glue

MiniLM is fine-tuned on SST-2, then pruned and refitted on several samples of other training sentences. The command
prints a table and writes JSON. It takes about 20 minutes on two cores.
"""

import json
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedModel

from hap_transformers import PruningPlan, Sensitivity, apply_plan, estimate_sensitivity, plan_pruning, reconstruct
from hap_transformers.data.demo import demo_model_path
from hap_transformers.data.tasks import load_task
from hap_transformers.sensitivity import kronecker, surgeon

from . import workloads
from .markdown_table import elimination_table


HERE = Path(__file__).parent
ONE_BY_ONE = 10**9
RATIOS = (0.6, 0.8)


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "elimination.json")
    train_examples: int = 3200
    examples: int = 512
    seeds: int = 3
    one_in: str = "256,128,64"


def batches_of(rows: Dataset, size: int) -> workloads.Batches:
    """Tokenizes sentences, each batch padded to its longest one."""
    tokenizer, batches = AutoTokenizer.from_pretrained(demo_model_path()), []
    for start in range(0, len(rows), size):
        part = rows.select(range(start, min(start + size, len(rows))))
        batch = dict(
            tokenizer(list(part["sentence"]), padding=True, truncation=True, max_length=64, return_tensors="pt")
        )
        batches.append({**batch, "labels": torch.tensor(list(part["label"]))})
    return batches


def fine_tune(model: PreTrainedModel, batches: workloads.Batches) -> None:
    """Trains for one epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(batches))
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    model.eval()


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, batches: workloads.Batches) -> torch.Tensor:
    """Shape `(examples, classes)`."""
    return torch.cat([model(**batch).logits.log_softmax(-1) for batch in batches])


def scored(model: PreTrainedModel, batches: workloads.Batches, one_in: int) -> tuple[Sensitivity, float]:
    """The scores, and the processor's seconds in eliminations."""
    surgeon.ONE_IN, seconds, removal_costs = one_in, [], kronecker.removal_costs

    def timed(*args):
        start = time.process_time()
        found = removal_costs(*args)
        seconds.append(time.process_time() - start)
        return found

    kronecker.removal_costs = timed
    try:
        return estimate_sensitivity(model, batches, progress=False), sum(seconds)
    finally:
        kronecker.removal_costs = removal_costs


def divergence(
    model: PreTrainedModel, plan: PruningPlan, batches: workloads.Batches, test: workloads.Batches, dense: torch.Tensor
) -> float:
    """KL divergence of the refitted model's predictions from the dense model's on unseen sentences."""
    smaller = deepcopy(model)
    apply_plan(smaller, plan)
    reconstruct(smaller, model, batches, progress=False)
    return float((dense.exp() * (dense - log_probabilities(smaller, test))).sum(-1).mean())


def removed(plan: PruningPlan) -> set[tuple[int, int]]:
    """Layer and number of every neuron that goes."""
    return {(layer, neuron) for layer, neurons in plan.removed["neurons"].items() for neuron in neurons}


def measure(
    model: PreTrainedModel, batches: workloads.Batches, test: workloads.Batches, sizes: list[int]
) -> list[dict]:
    """One row for each size of steps, the first of which removes one by one."""
    dense, rows = log_probabilities(model, test), []
    for one_in in (ONE_BY_ONE, *sizes):
        sensitivity, seconds = scored(model, batches, one_in)
        plans = [plan_pruning(sensitivity, model, ratio=ratio) for ratio in RATIOS]
        order = torch.cat(sensitivity.order["neurons"])
        first = rows[0] if rows else {"order": order, "removed": [removed(plan) for plan in plans]}
        rows.append(
            {
                "one_in": None if one_in == ONE_BY_ONE else one_in,
                "seconds": seconds,
                "order": order,
                "removed": [removed(plan) for plan in plans],
                "rank_correlation": float(spearmanr(order, first["order"]).statistic),
                "same": [len(removed(p) & r) / len(r) for p, r in zip(plans, first["removed"], strict=True)],
                "kl": [divergence(model, plan, batches, test, dense) for plan in plans],
            }
        )
        print({name: rows[-1][name] for name in ("one_in", "seconds", "rank_correlation", "kl")}, file=sys.stderr)
    return [{name: row[name] for name in row if name not in ("order", "removed")} for row in rows]


def main() -> None:
    """Measures everything, prints the table, writes JSON."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    data = load_task("sst2", args.data_dir).data
    rows = data["train"].shuffle(seed=0)
    model = workloads.load_model()
    fine_tune(model, batches_of(rows.select(range(args.train_examples)), 32))
    test, runs = batches_of(data["validation"], 64), []
    for seed in range(args.seeds):
        first = args.train_examples + seed * args.examples
        sample = batches_of(rows.select(range(first, first + args.examples)), 32)
        runs.append(measure(model, sample, test, [int(size) for size in args.one_in.split(",")]))
        result = {"runs": runs, "settings": {**vars(args), "output": None}, "threads": torch.get_num_threads()}
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(elimination_table(runs))


if __name__ == "__main__":
    main()
