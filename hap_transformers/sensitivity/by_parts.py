"""Scores all layers together, or in parts one after the other where their sums would not fit into memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate as running_sums
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from tqdm.auto import tqdm

from ..components.groups import Group
from ..components.sharded import is_sharded
from ..memory import memory_limit, named_out_of_memory
from .accumulate import accumulate
from .batches import scored_batches, shifts_labels
from .methods import Finished, Method
from .outputs import logits_of_all_tokens
from .precision import plain_forward
from .state_file import Progress, StateFile
from .statistics import SampleMoments
from .surgeon import elimination_bytes
from .task import ScoringTask


def score_on_batches(
    task: ScoringTask,
    scoring: Method,
    name: str,
    batches: Iterable[Mapping[str, Any]],
    *,
    tolerance: float | None,
    max_examples: int | None,
    max_memory: int | str | None,
    accelerator: Accelerator | None,
    state_file: str | Path | None,
    run: Mapping[str, Any],
    progress: bool,
) -> tuple[Finished, Progress]:
    """Runs a method over the batches, once for every part of the layers.

    The model's outputs, and so the directions that are backpropagated, are the same in every pass. The scores are
    therefore those of a single pass.

    Args:
        task (`ScoringTask`): The model, and all components to score.
        scoring (`Method`): The method, which has a `sample`.
        name (`str`): Its name.
        max_memory (`int` or `str`, *optional*): Bytes that the sums of a part may take, with its elimination.
        run (`Mapping[str, Any]`): What the state file must be of.
        tolerance, max_examples, accelerator, state_file, progress: As in [`estimate_sensitivity`]. The first part's
            reliability decides about `tolerance`.

    Returns:
        `tuple[Finished, Progress]`: The scores of all components in the task's order, and the samples behind them.

    Raises:
        ValueError: If a batch or the state file does not fit.
        torch.OutOfMemoryError: If the memory is short; the message says of what.
    """
    parts = parts_within(task, scoring, max_memory)
    kept = batches if len(parts) == 1 else _kept(batches, max_examples, shifts_labels(task.model))
    finished: list[Finished] = []
    done: list[Progress] = []
    states: list[StateFile] = []
    for i, groups in enumerate(parts):
        part = task if len(parts) == 1 else replace(task, groups=groups)
        layers = f"layers {groups[0].layer} to {groups[-1].layer}"
        state: StateFile | None = None
        if state_file is not None:
            own = {**run, "weights": f"{part.squared_norms.cpu().double().sum():.6e}"}
            suffix = f".{i}" if i else ""
            state = StateFile(Path(f"{state_file}{suffix}"), own, accelerator)
            states.append(state)
        if done:  # The first part has found out how many examples are enough.
            tolerance, max_examples = None, done[0].moments.num_examples
        with named_out_of_memory(f"{layers} were scored on batches", _advice(state)):
            found = accumulated(part, scoring, name, kept, tolerance, max_examples, accelerator, state, progress)
        with named_out_of_memory(f"costs of removal were computed for {layers}", _advice(state)):
            finished.append(_finished(part, scoring, found.moments, accelerator, progress))
        # The sums are the large part.
        done.append(replace(found, moments=replace(found.moments, sums=found.moments.sums[:0].clone())))
        del found
    for state in states:
        state.delete()
    return _in_order(task, parts, finished, done)


def parts_within(task: ScoringTask, scoring: Method, max_memory: int | str | None) -> list[list[Group]]:
    """Splits the groups into runs of whole layers whose sums fit into the memory; at least one layer each.

    Raises:
        ValueError: If `max_memory` is no number of bytes.
    """
    limit = memory_limit(max_memory)
    if limit is None or not scoring.by_layer or scoring.num_sums is None:
        return [task.groups]
    parts: list[list[Group]] = []
    for layer in sorted({group.layer for group in task.groups}):
        members = [group for group in task.groups if group.layer == layer]
        together = [*parts[-1], *members] if parts else members
        need = 8 * scoring.num_sums(replace(task, groups=together))
        need += max((elimination_bytes(group.reader.in_features) for group in together if group.readers), default=0)
        if parts and need <= limit:
            parts[-1] = together
        else:
            parts.append(members)
    places = {id(group): place for place, group in enumerate(task.groups)}
    return [sorted(part, key=lambda group: places[id(group)]) for part in parts]  # Kind by kind, as in the task.


def _kept(batches: Iterable[Mapping[str, Any]], max_examples: int | None, shifted: bool) -> list[Mapping[str, Any]]:
    """The batches that are scored, to be gone through several times: a loader may shuffle, an iterator ends."""
    seen: list[Mapping[str, Any]] = []

    def noted() -> Iterator[Mapping[str, Any]]:
        for batch in batches:
            seen.append(batch)
            yield batch

    for _ in scored_batches(noted(), max_examples, shifted):
        pass
    return seen


def accumulated(
    task: ScoringTask,
    scoring: Method,
    name: str,
    batches: Iterable[Mapping[str, Any]],
    tolerance: float | None,
    max_examples: int | None,
    accelerator: Accelerator | None,
    state: StateFile | None,
    progress: bool,
) -> Progress:
    """Runs a method over all batches."""
    assert scoring.sample is not None  # Methods without data do not get here.
    num_sums = 0 if scoring.num_sums is None else scoring.num_sums(task)
    fresh = Progress(SampleMoments.zeros(sum(task.counts), num_sums, task.sums_device))
    main_process = accelerator is None or accelerator.is_main_process
    bar = tqdm(batches, desc=f"Scoring ({name})", disable=None if progress and main_process else True, leave=False)
    with _scoring_mode(task), bar:
        return accumulate(
            scoring.sample,
            task,
            bar,
            fresh if state is None else state.load(fresh),
            per_example=scoring.per_example,
            max_examples=max_examples,
            # Processes that have a part of the weights each can only run the model together: all on all batches.
            accelerator=None if is_sharded(task.model) else accelerator,
            reliable=None if tolerance is None else lambda m: (reliability(task, scoring, m) or 0.0) >= tolerance,
            state=state,
        )


def reliability(task: ScoringTask, scoring: Method, moments: SampleMoments) -> float | None:
    """How well the ranking of the first kind would repeat on another sample."""
    first = task.columns(task.groups[0].kind.name)
    return moments.reliability(lambda means: scoring.finish(task, means)[first])


def _finished(
    task: ScoringTask, scoring: Method, moments: SampleMoments, accelerator: Accelerator | None, progress: bool
) -> Finished:
    """The final scores, the same in every process."""
    if scoring.settle is None:
        return Finished(scoring.finish(task, moments.mean.cpu()))
    found = scoring.settle(task, moments, progress)
    if accelerator is not None and accelerator.num_processes > 1:  # Another machine may round another way.
        found.scores = broadcast(found.scores.to(accelerator.device)).cpu()
        if found.order is not None:
            found.order = broadcast(found.order.to(accelerator.device)).cpu()
    return found


def _in_order(
    task: ScoringTask, parts: Sequence[Sequence[Group]], finished: Sequence[Finished], done: Sequence[Progress]
) -> tuple[Finished, Progress]:
    """Puts the components of all parts into the task's order."""
    if len(parts) == 1:
        return finished[0], done[0]
    starts = dict(zip(map(id, task.groups), running_sums([0, *task.counts]), strict=False))
    columns = [starts[id(group)] + torch.arange(group.num_components) for part in parts for group in part]
    order = torch.cat(columns).argsort()
    orders = [found.order for found in finished if found.order is not None]
    whole = Finished(
        scores=torch.cat([found.scores for found in finished])[order],
        order=torch.cat(orders)[order] if orders else None,
    )
    moments = SampleMoments.joined([progress.moments for progress in done], order.to(task.sums_device))
    return whole, replace(done[0], moments=moments)


def _advice(state: StateFile | None) -> str:
    """What to do when the memory has run out."""
    kept = "" if state is None else f" Repeat the call to go on from '{state.path}'."
    return (
        "Set max_memory to a number of bytes, for example max_memory='4GB', so that fewer layers are scored at once; "
        f"or give smaller batches.{kept}"
    )


@contextmanager
def _scoring_mode(task: ScoringTask) -> Iterator[None]:
    """Turns dropout off and freezes all weights; restores everything afterwards."""
    model = task.model
    training = [module for module in model.modules() if module.training]
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        # `precision` does the work of accelerate's autocast here. Compiled code does not call hooks.
        with plain_forward(model), logits_of_all_tokens(model):
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                yield
    finally:
        for module in training:
            module.training = True
        for parameter, value in required.items():
            parameter.requires_grad_(value)
