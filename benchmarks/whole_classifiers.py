"""Removes a share of all parameters of fine-tuned MiniLM, embeddings included, and measures its tasks' metrics.

    python -m benchmarks.whole_classifiers --data_dir ../shared/glue

MiniLM is fine-tuned on each task, as in `glue_scripts.compare_glue`, whose dense models are used if they are in
`--dense_dir`. Pruning is that of `HapConfig(budget="model")`, before and after the study's recovery. A cell is a line
of the file; one that is there is not computed again. It takes some three minutes of a core.
"""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

from transformers import HfArgumentParser, set_seed

from glue_scripts.compare_glue.cells import Cell, read_cells
from glue_scripts.compare_glue.job import Job
from glue_scripts.compare_glue.settings import COMMON
from hap_transformers import HapConfig

from .embeddings_cells import append_cell


HERE = Path(__file__).parent


class Key(NamedTuple):
    """The fields that tell one cell from another."""

    task: str
    ratio: float
    seed: int


@dataclass
class Arguments:
    """What to measure, and the file of results."""

    data_dir: str = "../shared/glue"
    output: str = str(HERE / "whole_classifiers.jsonl")
    dense_dir: str = field(default="outputs/compare", metadata={"help": "Output folder of compare_glue."})
    tasks: list[str] = field(default_factory=lambda: ["cola", "mrpc", "sst2", "stsb"])
    ratios: list[float] = field(default_factory=lambda: [0.5, 0.7])
    seeds: list[int] = field(default_factory=lambda: [0])


def cell_of(job: Job, ratio: float) -> Cell:
    """Prunes and recovers the dense model of a job."""
    settings = {"refit_examples": COMMON.refit_examples, "recovery_learning_rate": COMMON.recovery_learning_rate}
    config = HapConfig(budget="model", ratio=ratio, recovery_check="none", **settings)
    trainer = job.trainer(job.dense(), config)
    set_seed(job.seed)
    plan = trainer.prune()
    cell = {**Key(job.name, ratio, job.seed)._asdict(), "dense": job.dense_metrics, "saved": plan.saved}
    cell["pruned"] = job.measure(trainer.model)
    trainer.teacher = job.teacher
    set_seed(job.seed)
    trainer.train()
    return cell | {"recovered": job.measure(trainer.model), "parameters": trainer.results["parameters"]}


def main() -> None:
    """Computes the cells that are missing."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(args.output)
    for seed, task in product(args.seeds, args.tasks):
        missing = [ratio for ratio in args.ratios if Key(task, ratio, seed) not in read_cells(output, Key)]
        job = Job(task, seed, args.data_dir, args.dense_dir) if missing else None
        for ratio in missing:
            assert job is not None
            append_cell(output, cell_of(job, ratio))


if __name__ == "__main__":
    main()
