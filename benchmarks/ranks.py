"""Compares removing whole heads with removing dimensions, evenly or not, on classifiers, without training.

    python -m benchmarks.ranks --data_dir ../shared/glue

MiniLM is fine-tuned on a part of each task's training split. It is scored and refitted on samples of the same part.
The task's metric, the divergence from the dense model, and how often both predict the same class, are measured on the
part that was held out, and the time of a forward pass over the dense model's in the same rounds.
A cell that is in the output file is kept, so the command can be interrupted. `docs.render_results` makes the tables.
"""

import copy
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import DataCollatorWithPadding, HfArgumentParser, PreTrainedModel

from glue_scripts.compare_glue.cells import Cell, read_cells
from glue_scripts.compare_glue.job import Job
from hap_transformers import Sensitivity, apply_plan, estimate_sensitivity, plan_pruning, reconstruct, tune_layers
from hap_transformers.alignment.align_heads import align_heads
from hap_transformers.data.calibration import calibration_batches
from hap_transformers.efficiency import compare_latency, example_inputs

from .embeddings_cells import append_cell
from .workloads import BATCH_SIZE


HERE = Path(__file__).parent
RATIOS = (0.6, 0.8, 0.9, 0.95)
EXAMPLES = 1024
# Texts and tokens of the batch whose time is measured, and how often.
LATENCY_INPUTS, ROUNDS = (32, 64), 7
DIMENSIONS = ("query_key_dims", "value_dims", "neurons")
# By name, the kinds that are removed, whether heads of a layer lose dimensions evenly, and whether layers are tuned.
WAYS = {
    "heads": (("heads", "neurons"), True, False),
    "dimensions": (DIMENSIONS, True, False),
    "uneven dimensions": (DIMENSIONS, False, False),
    "dimensions, tuned": (DIMENSIONS, True, True),
}

Batches = list[dict[str, torch.Tensor]]


@dataclass
class Arguments:
    """What to measure, and where results go."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "ranks.jsonl")
    dense_dir: str = "build/refit"
    tasks: list[str] = field(default_factory=lambda: ["mrpc", "sst2", "cola", "stsb"])
    samples: list[int] = field(default_factory=lambda: [0, 1, 2])
    ways: list[str] = field(default_factory=lambda: list(WAYS))


class Key(NamedTuple):
    """The fields that tell one cell from another: `sample` is the seed of the calibration sample."""

    task: str
    way: str
    ratio: float
    sample: int


class Bench:
    """One task's dense model, its batches, and its cells."""

    def __init__(self, job: Job):
        self.job, self.dense = job, job.dense().eval()
        self.collate = DataCollatorWithPadding(job.tokenizer)
        self.known: dict[tuple, tuple[PreTrainedModel, Sensitivity, float]] = {}
        held_out = self.words(job.evaluated)
        self.evaluated = self.batches(held_out, len(held_out), 0)

    def words(self, rows: Any) -> Any:
        """Rows without labels."""
        return rows.select_columns([n for n in rows.column_names if n in self.job.tokenizer.model_input_names])

    def batches(self, rows: Any, count: int, seed: int) -> Batches:
        """Batches of a sample."""
        return list(calibration_batches(rows, count, seed, BATCH_SIZE, self.collate))

    def scored(
        self, kinds: tuple[str, ...], batches: Batches, sample: int
    ) -> tuple[PreTrainedModel, Sensitivity, float]:
        """The dense model as it is scored, its scores, and the seconds that they took; those of a sample are kept."""
        if (kinds, sample) not in self.known:
            start = time.process_time()
            model = copy.deepcopy(self.dense)
            if kinds == DIMENSIONS:
                align_heads(model, batches, progress=False)
            scores = estimate_sensitivity(model, batches, components=kinds, progress=False)
            self.known[kinds, sample] = model, scores, time.process_time() - start
        return self.known[kinds, sample]

    def cell(self, key: Key) -> Cell:
        """Prunes a copy and measures it."""
        kinds, even, tuned = WAYS[key.way]
        batches = self.batches(self.words(self.job.train), EXAMPLES, key.sample)
        model, scores, score_seconds = self.scored(kinds, batches, key.sample)
        start = time.process_time()
        pruned = copy.deepcopy(model)
        apply_plan(pruned, plan_pruning(scores, pruned, ratio=key.ratio, even_heads=even))
        reconstruct(pruned, self.dense, batches, progress=False)
        refit_seconds = time.process_time() - start
        if tuned:
            tune_layers(pruned, self.dense, batches, progress=False)
        tuning_seconds = time.process_time() - start - refit_seconds
        fidelity = compared(pruned, self.dense, self.evaluated)
        inputs = example_inputs(self.dense, *LATENCY_INPUTS)
        timed = compare_latency({"dense": self.dense, "pruned": pruned}, inputs, ROUNDS)
        return {
            **key._asdict(),
            **{name: round(value, 5) for name, value in fidelity.items()},
            "dense": self.job.dense_metrics,
            "pruned": self.job.measure(pruned),
            "time": round(timed["pruned"] / timed["dense"], 4),
            "seconds": {"score": round(score_seconds, 1), "refit": round(refit_seconds, 1)}
            | ({"tuning": round(tuning_seconds, 1)} if tuned else {}),
        }


def compared(model: PreTrainedModel, dense: PreTrainedModel, batches: Batches) -> dict[str, float]:
    """How far predictions are from the dense model's: mean divergence, and of classes the share of equal ones.

    Values are means of normal distributions of variance 1.
    """
    with torch.no_grad():
        ours, theirs = (torch.cat([network(**batch).logits for batch in batches]) for network in (model, dense))
    if dense.config.num_labels == 1:
        return {"kl": float((ours - theirs).square().mean() / 2)}
    divergence = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    return {"kl": float(divergence), "agreement": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())}


def main() -> None:
    """Computes the cells that are missing, a sample of every task before the next sample."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output, benches = Path(args.output), dict[str, Bench]()
    known = read_cells(output, Key)
    for sample, task, way, ratio in product(args.samples, args.tasks, args.ways, RATIOS):
        key = Key(task, way, ratio, sample)
        if key in known:
            continue
        if task not in benches:
            benches[task] = Bench(Job(task, 0, args.data_dir, args.dense_dir, fold=True))
        cell = benches[task].cell(key)
        append_cell(output, cell)
        print(cell, flush=True)


if __name__ == "__main__":
    main()
