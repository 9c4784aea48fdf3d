"""Runs a scoring method over batches, shared between processes, until all are done or the ranking is reliable."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from .batches import ScoredBatch, scored_batches, shifts_labels
from .methods import SampleFunction
from .state_file import Progress, StateFile
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
    state: StateFile | None = None,
) -> Progress:
    """Adds the samples of every batch that is not yet done.

    Every process iterates over the same batches and scores every `num_processes`-th of them. Processes exchange only
    moments.

    Args:
        sample (`SampleFunction`): The method.
        task (`ScoringTask`): The model and the components to score.
        batches (`Iterable`): The batches, the same in every process.
        progress (`Progress`): The progress to start from, the same in every process.
        per_example (`bool`): Whether each of the method's samples is one example; otherwise it is one probe on the
            whole batch.
        max_examples (`int`, *optional*): Stop after this many examples.
        accelerator (`Accelerator`, *optional*): The processes. By default only this one.
        reliable (`Callable`, *optional*): Takes the moments, returns whether scoring may stop.
        state (`StateFile`, *optional*): Keeps the progress, after rounds of one batch per process and at the end.

    Returns:
        `Progress`: The final progress, the same in every process.

    Raises:
        ValueError: If the batches are not those that `progress` was made from, or a sample is not finite.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    # The first process continues from the previous moments. The result equals that of an uninterrupted run bit by bit.
    sizes = len(progress.moments.mean), len(progress.moments.sums)
    moments = progress.moments if rank == 0 else SampleMoments.zeros(*sizes, task.sums_device)

    num_probes, done, before = progress.num_probes, progress.batches_done, progress.moments.num_examples
    # A run that was interrupted after it had converged needs no more batches.
    converged = bool(reliable and done and reliable(_combined_means(moments, accelerator)))
    for batch in () if converged else scored_batches(batches, max_examples, shifts_labels(task.model)):
        if batch.number < progress.batches_done:
            continue
        if batch.number == progress.batches_done and batch.first != before:
            raise ValueError(
                f"The state file has {before} examples of {progress.batches_done} batches, these batches have "
                f"{batch.first}. Repeat the interrupted call with the same batches."
            )
        if batch.number % world == rank:
            samples = _finite_samples(sample, task, batch.to(task.device))
            num_probes = samples.num_probes
            if per_example:
                moments.add_examples(samples.values, batch.first)
            else:
                moments.add_probes(samples.values, batch.size, batch.number)
            moments.add_sums(samples.sums)
        done = batch.number + 1
        if done % world:
            continue
        if reliable and reliable(_combined_means(moments, accelerator)):
            converged = True
            break
        if state is not None and state.is_due():
            state.save(_combined(Progress(moments, num_probes, done), accelerator))
    final = _combined(Progress(moments, num_probes, done), accelerator)
    if reliable:
        final.converged = converged or reliable(final.moments)
    if state is not None:
        state.save(final)
    return final


def _combined_means(moments: SampleMoments, accelerator: Accelerator | None) -> SampleMoments:
    """Adds up all that a reliability needs: the moments of all processes without the sums, which are large."""
    return _combined(Progress(replace(moments, sums=moments.sums[:0])), accelerator).moments


def _combined(mine: Progress, accelerator: Accelerator | None) -> Progress:
    """Adds up the moments of all processes."""
    if accelerator is None or accelerator.num_processes == 1:
        return mine
    moments = mine.moments
    part = torch.cat([moments.pack(), moments.totals.new_tensor([mine.num_probes])])
    # All processes add the parts in the same order, for bit-equal sums. One part is sent at a time to save memory.
    total, probes = SampleMoments.zeros(len(moments.mean), len(moments.sums), moments.mean.device), 0
    for source in range(accelerator.num_processes):
        sent = broadcast(part.to(accelerator.device, copy=True), from_process=source)
        total.add(moments.unpacked(sent[:-1]))
        probes = max(probes, int(sent[-1]))
    return Progress(total, probes, mine.batches_done)


def _finite_samples(sample: SampleFunction, task: ScoringTask, batch: ScoredBatch) -> Samples:
    """Computes a batch's samples, and repeats this with a lower loss scale as long as fp16 overflows.

    Raises:
        ValueError: If a sample is not finite, and a lower loss scale cannot help.
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
