"""Compares ways to prune on GLUE: every method from the same dense models, with the same recovery.

    python compare_glue.py --data_dir PARQUET_FOLDER --preset quick --workers 2
    python compare_glue.py --data_dir PARQUET_FOLDER --tasks mrpc --methods hap gradient --ratios 0.8 --seeds 0

Every cell (task, method, budget, ratio, seed, fold) is a line of `cells.jsonl`; those that are there are not run
again. Dense models and their scores are kept beside it: after a change of settings or code, start in another folder.
All cells of a task and seed, of all grids, come one after the other: its dense model is not needed again, and what is
missing can be run elsewhere. Tables (Markdown and CSV) and pictures of each grid follow. Workers share the cores: two
with a thread each do nearly twice as much as one with two. With `--fold`, a part of the training split that no model
is trained on takes the place of the validation split: settings are chosen there.
"""

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from comparison_grids import ALL_RATIOS, ALL_SEEDS, PRESETS, RIVALS, Grid, Key, job_of, read_cells
from comparison_job import SETTINGS, Job
from comparison_methods import METHODS
from comparison_report import write_report
from comparison_table import Cell
from tqdm.auto import tqdm
from transformers import HfArgumentParser


@dataclass
class Arguments:
    """What to compare."""

    data_dir: str = field(metadata={"help": "Folder with TASK/{train,validation}.parquet."})
    output_dir: str = field(default="outputs/compare", metadata={"help": "Where everything is kept."})
    preset: str | None = field(default=None, metadata={"help": "quick or full, in place of the next five."})
    tasks: list[str] = field(default_factory=lambda: list(SETTINGS))
    methods: list[str] = field(default_factory=lambda: list(RIVALS))
    budget: str = field(default="params", metadata={"help": "What ratios are a share of: params or heads."})
    ratios: list[float] = field(default_factory=lambda: list(ALL_RATIOS))
    seeds: list[int] = field(default_factory=lambda: list(ALL_SEEDS))
    fold: bool = field(default=False, metadata={"help": "Evaluate on a held-out part of the training split."})
    recover: bool = field(default=True, metadata={"help": "Train after pruning, too."})
    workers: int = field(default=1, metadata={"help": "Processes, which share the cores."})
    report_only: bool = field(default=False, metadata={"help": "Run nothing; write what the cells there are show."})


def main(arguments: list[str] | None = None) -> dict[str, list[Cell]]:
    """Runs the cells that are missing, writes and prints the tables, and returns the cells asked for, by grid."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    if args.preset not in (None, *PRESETS):
        raise ValueError(f"Unknown preset '{args.preset}'; choose one of {', '.join(PRESETS)}.")
    own = {"grid": Grid(args.tasks, args.methods, args.ratios, args.seeds, args.budget)}
    grids = PRESETS.get(args.preset, own)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "cells.jsonl"
    if not args.report_only:
        wanted = list(dict.fromkeys(key for grid in grids.values() for key in grid.keys(args.fold)))
        _run(args, wanted, file)
    found = {name: grid.cells_in(file, args.fold) for name, grid in grids.items()}
    for name, cells in found.items():
        if cells:
            print(write_report(f"{name}-fold" if args.fold else name, cells, output))
    return found


def _run(args: Arguments, keys: list[Key], file: Path) -> None:
    """Runs the cells that are missing, as many tasks and seeds at a time as there are workers."""
    cells = read_cells(file)
    missing = [key for key in keys if key not in cells or (args.recover and "recovered" not in cells[key])]
    jobs = sorted(dict.fromkeys(map(job_of, missing)), key=lambda job: job[1])
    with _pool(args.workers) as pool:
        for start in range(0, len(jobs), args.workers):
            present = jobs[start : start + args.workers]
            own = [key for key in missing if job_of(key) in present]
            for job, metrics in _each(pool, _dense, "Dense models", args, present):
                same = [cell for key, cell in cells.items() if job_of(key) == job and cell["fold"] == args.fold]
                _validate_same_dense(job, metrics, same, file)
            scores = dict.fromkeys((*job_of(key), METHODS[key[1]].score) for key in own)
            list(_each(pool, _score, "Scores", args, list(scores)))
            for cell in _each(pool, _cell, "Cells", args, [key[:-1] for key in own]):
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(cell) + "\n")


def _validate_same_dense(job: tuple[str, int], metrics: dict[str, float], cells: list[Cell], file: Path) -> None:
    if any(cell["dense"] != metrics for cell in cells):
        raise ValueError(
            f"'{file}' has cells of {job[0]}, seed {job[1]}, that start from another dense model than the one here, "
            "which was trained elsewhere or with other settings. Remove those lines, or choose another --output_dir."
        )


def _pool(workers: int) -> AbstractContextManager[ProcessPoolExecutor | None]:
    if workers == 1:
        return nullcontext()
    threads = max(1, (os.cpu_count() or 1) // workers)
    spawn = multiprocessing.get_context("spawn")  # A forked process cannot use the threads of its parent.
    return ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(threads,))


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    # When the main process is killed, the results would have nobody to write them down.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _each(
    pool: ProcessPoolExecutor | None, function: Callable, what: str, args: Arguments, keys: Sequence[tuple]
) -> Iterator[Any]:
    """Results in the order in which they are ready."""
    if pool is None:
        results = (function(args, *key) for key in keys)
    else:
        futures = [pool.submit(function, args, *key) for key in keys]
        results = (future.result() for future in as_completed(futures))
    try:
        yield from tqdm(results, what, total=len(keys), disable=None if keys else True)
    except BaseException:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        raise


@lru_cache(maxsize=2)
def _job(task: str, seed: int, data_dir: str, output_dir: str, fold: bool) -> Job:
    return Job(task, seed, data_dir, output_dir, fold)


def _dense(args: Arguments, task: str, seed: int) -> tuple[tuple[str, int], dict[str, float]]:
    return (task, seed), _job(task, seed, args.data_dir, args.output_dir, args.fold).dense_metrics


def _score(args: Arguments, task: str, seed: int, method: str) -> None:
    _job(task, seed, args.data_dir, args.output_dir, args.fold).scores(method)


def _cell(args: Arguments, task: str, method: str, budget: str, ratio: float, seed: int) -> Cell:
    return _job(task, seed, args.data_dir, args.output_dir, args.fold).run(method, budget, ratio, args.recover)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"compare_glue.py: {error}")
