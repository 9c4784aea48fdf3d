"""Runs the cells of a comparison that are missing, and reports on all of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from .base_models import BASE_MODELS, MINILM
from .cells import Cell, Key, read_cells
from .grids import ALL_RATIOS, ALL_SEEDS, PRESETS, RIVALS, Grid
from .job import Job
from .methods import METHODS
from .report import write_report
from .settings import COMMON, SETTINGS, CommonSettings
from .workers import make_pool, run_each


@dataclass
class Arguments:
    """What to compare."""

    data_dir: str = field(metadata={"help": "Folder with TASK/{train,validation}.parquet."})
    output_dir: str = field(default="outputs/compare", metadata={"help": "Folder of all results."})
    preset: str | None = field(default=None, metadata={"help": f"{', '.join(PRESETS)}, for the next six."})
    model: str = field(default=MINILM, metadata={"help": f"What is fine-tuned: {', '.join(BASE_MODELS)}."})
    tasks: list[str] = field(default_factory=lambda: list(SETTINGS))
    methods: list[str] = field(default_factory=lambda: list(RIVALS))
    budget: str = field(default="params", metadata={"help": "What ratios are a share of: params or heads."})
    ratios: list[float] = field(default_factory=lambda: list(ALL_RATIOS))
    seeds: list[int] = field(default_factory=lambda: list(ALL_SEEDS))
    fold: bool = field(default=False, metadata={"help": "Evaluate on a held-out part of the training split."})
    recover: bool = field(default=True, metadata={"help": "Train after pruning, too."})
    refit_examples: int = field(default=COMMON.refit_examples, metadata={"help": "Examples to refit on."})
    recovery_steps: int = field(default=COMMON.recovery_steps, metadata={"help": "Batches to recover on."})
    recovery_learning_rate: float = COMMON.recovery_learning_rate
    train_examples: int | None = field(default=None, metadata={"help": "Examples to train on; by default the task's."})
    workers: int = field(default=1, metadata={"help": "Number of processes; they share the cores."})
    report_only: bool = field(default=False, metadata={"help": "Run nothing; report on the cells there are."})

    @property
    def common(self) -> CommonSettings:
        """What all methods have in common."""
        return CommonSettings(
            self.refit_examples, self.recovery_steps, self.recovery_learning_rate, self.train_examples
        )


def main(arguments: list[str] | None = None) -> dict[str, list[Cell]]:
    """Runs the missing cells, writes and prints the tables, and returns the requested cells by grid."""
    parser = HfArgumentParser(Arguments, prog="python -m glue_scripts.compare_glue", description=__doc__)
    (args,) = parser.parse_args_into_dataclasses(arguments)
    if args.preset not in (None, *PRESETS):
        raise ValueError(f"Unknown preset '{args.preset}'; choose one of {', '.join(PRESETS)}.")
    requested = {"grid": Grid(args.tasks, args.methods, args.ratios, args.seeds, args.budget, args.model)}
    grids = PRESETS.get(args.preset, requested)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "cells.jsonl"
    if not args.report_only:
        _run(args, list(dict.fromkeys(key for grid in grids.values() for key in grid.keys(args.fold))), file)
    found = {name: grid.cells_in(file, args.fold) for name, grid in grids.items()}
    for name, cells in found.items():
        if cells:
            print(write_report(f"{name}-fold" if args.fold else name, cells, output))
    return found


def _run(args: Arguments, keys: Sequence[Key], file: Path) -> None:
    """Runs the missing cells, for as many tasks and seeds at a time as there are workers."""
    cells = read_cells(file)
    settings = [CommonSettings(**cell.get("common", {})) for cell in cells.values()]
    if others := [common for common in settings if common != args.common]:
        raise ValueError(
            f"'{file}' has cells with other common settings, {asdict(others[0])}, than {asdict(args.common)}. Choose "
            "another --output_dir."
        )
    missing = [key for key in keys if key not in cells or (args.recover and "recovered" not in cells[key])]
    jobs = sorted(dict.fromkeys(key.job for key in missing), key=lambda job: job[2])
    with make_pool(args.workers) as pool:
        for start in range(0, len(jobs), args.workers):
            current = jobs[start : start + args.workers]
            for job, metrics in run_each(pool, _dense, "Dense models", args, current):
                same = [cell for key, cell in cells.items() if key.job == job and key.fold == args.fold]
                _validate_same_dense(job, metrics, same, file)
            todo = [key for key in missing if key.job in current]
            # Any method of each way to score.
            scores = {(*key.job, METHODS[key.method].score.name): (*key.job, key.method) for key in todo}
            list(run_each(pool, _score, "Scores", args, list(scores.values())))
            for cell in run_each(pool, _cell, "Cells", args, [(key,) for key in todo]):
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(cell) + "\n")


def _validate_same_dense(job: tuple[str, str, int], metrics: dict[str, float], cells: list[Cell], file: Path) -> None:
    if any(cell["dense"] != metrics for cell in cells):
        raise ValueError(
            f"'{file}' has cells of {job[1]}, seed {job[2]}, that start from another dense model than the one here. "
            "One of the two was trained elsewhere or with other settings. Remove those lines, or choose another "
            "--output_dir."
        )


@lru_cache(maxsize=2)  # A worker's current job, and one before: their data are tokenized once.
def _job(model: str, task: str, seed: int, data_dir: str, output_dir: str, fold: bool, common: CommonSettings) -> Job:
    return Job(task, seed, data_dir, output_dir, fold, model, common)


def _dense(args: Arguments, *job: Any) -> tuple[tuple[Any, ...], dict[str, float]]:
    return job, _job(*job, args.data_dir, args.output_dir, args.fold, args.common).dense_metrics


def _score(args: Arguments, model: str, task: str, seed: int, method: str) -> None:
    _job(model, task, seed, args.data_dir, args.output_dir, args.fold, args.common).scored(METHODS[method].score)


def _cell(args: Arguments, key: Key) -> Cell:
    job = _job(*key.job, args.data_dir, args.output_dir, args.fold, args.common)
    return job.run(key.method, key.budget, key.ratio, args.recover)
