"""Compares ways to prune on GLUE: every method from the same dense models, with the same recovery.

    python compare_glue.py --data_dir PARQUET_FOLDER --output_dir outputs/compare --workers 2
    python compare_glue.py --data_dir PARQUET_FOLDER --tasks mrpc --methods hap gradient --ratios 0.8 --seeds 0

Every cell (task, method, budget, ratio, seed) is a line of `cells.jsonl`; those that are there are not run again.
Dense models and their scores are kept beside it. Workers share the cores: two with a thread each do nearly twice as
much as one with two. With `--fold`, a part of the training split that no model is trained on takes the place of the
validation split: settings are chosen there.
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
from comparison_job import SETTINGS, Job
from comparison_methods import CONTROL, METHODS
from comparison_table import table
from tqdm.auto import tqdm
from transformers import HfArgumentParser


COMPARED = ("hap", "gradient", "gradient, floor and refit", "top layers dropped", CONTROL)


@dataclass
class Arguments:
    """What to compare."""

    data_dir: str = field(metadata={"help": "Folder with TASK/{train,validation}.parquet."})
    output_dir: str = field(default="outputs/compare", metadata={"help": "Where cells and dense models are kept."})
    tasks: list[str] = field(default_factory=lambda: list(SETTINGS))
    methods: list[str] = field(default_factory=lambda: list(COMPARED))
    budget: str = field(default="params", metadata={"help": "What ratios are a share of: params or heads."})
    ratios: list[float] = field(default_factory=lambda: [0.4, 0.6, 0.8])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    fold: bool = field(default=False, metadata={"help": "Evaluate on a held-out part of the training split."})
    recover: bool = field(default=True, metadata={"help": "Train after pruning, too."})
    workers: int = field(default=1, metadata={"help": "Processes, which share the cores."})


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the cells that are missing, prints the table and returns all cells asked for."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(arguments)
    unknown = [name for name in args.methods if name not in METHODS]
    unknown += [name for name in args.tasks if name not in SETTINGS]
    if unknown:
        raise ValueError(f"Unknown {unknown}; methods are {', '.join(METHODS)}, tasks {', '.join(SETTINGS)}.")
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    cells_file = output / "cells.jsonl"
    lines = cells_file.read_text(encoding="utf-8").splitlines() if cells_file.exists() else []
    cells = {_key(cell): cell for cell in map(json.loads, lines)}
    wanted = [
        (task, method, args.budget, ratio, seed, args.fold)
        for seed in args.seeds
        for task in args.tasks
        for method in args.methods
        for ratio in ([0.0] if method == CONTROL else args.ratios)
    ]
    missing = [key for key in wanted if key not in cells]
    jobs = dict.fromkeys((task, seed) for task, _, _, _, seed, _ in missing)
    scores = dict.fromkeys((task, seed, METHODS[method].score) for task, method, _, _, seed, _ in missing)
    with _pool(args.workers) as pool:
        for function, what, keys in ((_dense, "Dense models", jobs), (_score, "Scores", scores)):
            list(_each(pool, function, what, args, list(keys)))
        for cell in _each(pool, _cell, "Cells", args, [key[:-1] for key in missing]):
            cells[_key(cell)] = cell
            with cells_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
    print(table([cells[key] for key in wanted]))
    return [cells[key] for key in wanted]


def _key(cell: dict[str, Any]) -> tuple:
    return tuple(cell[name] for name in ("task", "method", "budget", "ratio", "seed", "fold"))


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


def _dense(args: Arguments, task: str, seed: int) -> None:
    _job(task, seed, args.data_dir, args.output_dir, args.fold).dense()


def _score(args: Arguments, task: str, seed: int, method: str) -> None:
    _job(task, seed, args.data_dir, args.output_dir, args.fold).scores(method)


def _cell(args: Arguments, task: str, method: str, budget: str, ratio: float, seed: int) -> dict[str, Any]:
    return _job(task, seed, args.data_dir, args.output_dir, args.fold).run(method, budget, ratio, args.recover)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"compare_glue.py: {error}")
