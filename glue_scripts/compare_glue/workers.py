"""Processes that share the cores, and end with the process that started them."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tqdm.auto import tqdm


def make_pool(workers: int) -> AbstractContextManager[ProcessPoolExecutor | None]:
    """Starts processes that share the cores; for a single worker, gives `None`: the main process is that worker."""
    if workers == 1:
        return nullcontext()
    threads = max(1, (os.cpu_count() or 1) // workers)
    spawn = multiprocessing.get_context("spawn")  # A forked process cannot use the threads of its parent.
    return ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(threads,))


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    # Only the main process writes results down. Without it, a worker works in vain.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def run_each(
    pool: ProcessPoolExecutor | None, function: Callable, title: str, common: Any, arguments: Sequence[tuple]
) -> Iterator[Any]:
    """Calls a function once for each tuple of arguments and yields the results as they become ready.

    Args:
        pool (`ProcessPoolExecutor`, *optional*): Where to call it; `None` is the main process.
        function (`Callable`): The function.
        title (`str`): Title of the progress bar.
        common: The function's first argument in every call.
        arguments (`Sequence[tuple]`): The other arguments of each call.
    """
    if pool is None:
        results = (function(common, *call) for call in arguments)
    else:
        futures = [pool.submit(function, common, *call) for call in arguments]
        results = (future.result() for future in as_completed(futures))
    try:
        yield from tqdm(results, title, total=len(arguments), disable=None if arguments else True)
    except BaseException:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        raise
