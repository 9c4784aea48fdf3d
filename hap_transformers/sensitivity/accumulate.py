"""Runs a scoring method over batches: shared between processes, interruptible, stopped when it is good enough."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from .batches import ScoredBatch, scored_batches
from .methods import SampleFunction
from .state_file import Progress
from .statistics import SampleMoments
from .task import Samples, ScoringTask


def accumulate(
    sample: SampleFunction,
    task: ScoringTask,
    batches: Iterable[Mapping[str, Any]],
    progress: Progress,
    *,
    per_example: bool,
    max_examples: int | None = None,
    accelerator: Accelerator | None = None,
    reliable: Callable[[SampleMoments], bool] | None = None,
    save: Callable[[Progress], None] | None = None,
) -> Progress:
    """Adds the samples of every batch that is not yet done.

    Every process goes through the same batches and scores each `num_processes`-th of them; only moments travel.

    Args:
        sample (`SampleFunction`): The method.
        task (`ScoringTask`): What it scores.
        batches (`Iterable`): The data, the same in every process.
        progress (`Progress`): Where to start from, the same in every process.
        per_example (`bool`): Whether the method's samples are examples, or probes on the whole batch.
        max_examples (`int`, *optional*): Stop after this many examples.
        accelerator (`Accelerator`, *optional*): The processes; by default this one alone.
        reliable (`Callable`, *optional*): Says whether scoring may stop.
        save (`Callable`, *optional*): Gets the progress after every round of batches.

    Returns:
        `Progress`: The same in every process.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    empty = SampleMoments.zeros(len(progress.moments.mean), len(progress.moments.sums))
    # The first process goes on with what was done before, to the same bits as if it had never stopped.
    own = progress.moments if rank == 0 else empty

    def everywhere(batches_done: int) -> Progress:
        if accelerator is None or world == 1:
            return Progress(own, num_probes, batches_done)
        part = torch.cat([own.pack(), torch.tensor([float(num_probes)])])
        # Added up in the processes' order, to the same bits in each of them; one at a time, as they can be large.
        moments, probes = SampleMoments.zeros(len(own.mean), len(own.sums)), 0
        for source in range(world):
            sent = broadcast(part.to(accelerator.device, copy=True), from_process=source).cpu()
            moments.add(own.unpacked(sent[:-1]))
            probes = max(probes, int(sent[-1]))
        return Progress(moments, probes, batches_done)

    num_probes, done, before = progress.num_probes, progress.batches_done, progress.moments.num_examples
    for batch in scored_batches(batches, max_examples):
        if batch.number < progress.batches_done:
            continue
        if batch.number == progress.batches_done and batch.first != before:
            raise ValueError(
                f"The state file has {before} examples of {progress.batches_done} batches, these batches have "
                f"{batch.first}. Repeat the interrupted call with the batches it had."
            )
        if batch.number % world == rank:
            samples = _finite_samples(sample, task, batch.to(task.device))
            num_probes = samples.num_probes
            if per_example:
                own.add_examples(samples.values, batch.first)
            else:
                own.add_probes(samples.values, batch.size, batch.number)
            if samples.sums is not None:
                own.sums += samples.sums.cpu()
        done = batch.number + 1
        if (reliable or save) and done % world == 0:
            state = everywhere(done)
            if reliable and reliable(state.moments):
                state.converged = True
                return state
            if save:
                save(state)
    state = everywhere(done)
    if reliable:
        state.converged = reliable(state.moments)
    return state


def _finite_samples(sample: SampleFunction, task: ScoringTask, batch: ScoredBatch) -> Samples:
    """A batch's samples, done again with a lower loss scale while fp16 overflows.

    Raises:
        ValueError: If a sample is not finite and no loss scale is to blame.
    """
    while True:
        samples = sample(task, batch)
        if samples.values.isfinite().all():
            return samples
        if not task.precision.lower_scale():
            raise ValueError(
                f"Derivatives of batch {batch.number} are not finite, though its loss is. Check the batch for extreme "
                "values, or score without `precision`."
            )
