"""Measures how long passes of a model take with fewer and fewer components."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..components.forwards import eager_copy, eager_model
from ..components.groups import KINDS, Group, Kind, by_kind, find_groups
from ..components.record import recorded_structure
from ..efficiency import evaluating
from ..surgery.apply_plan import apply_plan
from ..surgery.plan import PruningPlan
from .settings import finest_step


# Components of a group, its depth in a chain of groups, and the sizes of its projections and maps.
Shape = tuple[Any, ...]


def grid(kind: Kind, dense: int, points: int) -> list[int]:
    """Numbers of components to measure at: evenly spaced ones, the next larger widths, and a few small ones."""
    step = kind.step
    even = [step * round(dense * place / (points - 1) / step) for place in range(points - 1)]
    small = [1, step, step * math.ceil(0.02 * dense / step)]
    beside = [count + step for count in even[1:]]
    return sorted({count for count in (*even, *small, *beside) if count < dense} | {dense})


def rising(seconds: np.ndarray) -> np.ndarray:
    """Seconds that never fall, from 0: more components never take less time but for noise, which misleads plans."""
    highest_before = np.maximum.accumulate(seconds)
    lowest_after = np.minimum.accumulate(seconds[::-1])[::-1]
    middle = (highest_before + lowest_after) / 2
    return middle - middle[0]


def validate_measurable(model: PreTrainedModel) -> None:
    """Checks that a table can be measured with a model.

    Raises:
        ValueError: If it has lost components.
    """
    model = eager_model(model)
    if recorded_structure(model.config) is not None:
        raise ValueError(
            f"A latency table is measured on a whole model; this {type(model).__name__} has lost components. Measure "
            "the dense model, or pass the table that was measured with it."
        )


@dataclass
class Alike:
    """Groups of a kind that take equally long.

    Args:
        key (`str`): Names them in the table.
        kind (`Kind`): The kind.
        layers (`list[int]`): Numbers of their layers.
        components (`int`): What each of them has.
        depth (`int`): How many groups lie before each in its block, of which each is read by what writes the next.
    """

    key: str
    kind: Kind
    layers: list[int]
    components: int
    depth: int


def alike_groups(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Alike]:
    """Sorts a model's groups by what they take: by their sizes, and the sizes of the maps that they work on.

    Args:
        model (`PreTrainedModel`): The dense model.
        inputs (`Mapping[str, Any]`): The batch that counts.
    """
    validate_measurable(model)
    found = []
    for kind, groups in by_kind(group for group in find_groups(model) if not group.kind.outside).items():
        shapes = shapes_of(model, groups, inputs)
        distinct = list(dict.fromkeys(shapes))
        for number, shape in enumerate(distinct):
            members = [group for group, own in zip(groups, shapes, strict=True) if own == shape]
            key = f"{kind.name}/{number}" if len(distinct) > 1 else kind.name
            layers = [group.layer for group in members]
            found.append(Alike(key, kind, layers, members[0].num_components, shape[1]))
    # A group shrinks once those are gone that it reads.
    return sorted(found, key=lambda alike: alike.depth)


def sets_of(found: Iterable[Alike]) -> dict[str, list[int]]:
    """For kinds whose layers differ, the number of the set that each layer is in."""
    sets: dict[str, dict[int, int]] = {}
    for alike in found:
        name, _, number = alike.key.partition("/")
        if number:
            sets.setdefault(name, {}).update(dict.fromkeys(alike.layers, int(number)))
    return {name: [numbers[layer] for layer in sorted(numbers)] for name, numbers in sets.items()}


def shapes_of(model: PreTrainedModel, groups: Sequence[Group], inputs: Mapping[str, Any]) -> list[Shape]:
    """For every group what says how long it takes."""
    given: Counter[nn.Module] = Counter()

    def see(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        given[module] += output.numel()

    ends = {p.module for group in groups for p in (*group.writers, *group.readers)}
    handles = [module.register_forward_hook(see) for module in ends]
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    depths: dict[nn.Module, int] = {}  # Of groups, by what reads them.
    for group in groups:
        depth = max((depths[writer.module] + 1 for writer in group.writers if writer.module in depths), default=0)
        depths |= {reader.module: depth for reader in group.readers}
    return [
        (
            group.num_components,
            depths[group.readers[0].module] if group.readers else 0,
            *((p.in_features, p.out_features, given[p.module]) for p in (*group.writers, *group.readers)),
        )
        for group in groups
    ]


def widths_of(groups: Sequence[Group]) -> list[int]:
    """A few widths to measure at: multiples that suit kernels, and that of the dense model."""
    runs = next(group.runs for group in groups if group.runs is not None)
    dense = runs.whole.head_size
    step = finest_step(groups[0].kind.step, dense)
    wider = max(step, step * math.ceil(dense / step / 4))
    return sorted({step, *range(wider, dense, wider), dense})


def shares_of_fewer(
    model: PreTrainedModel,
    found: Iterable[Alike],
    grids: Mapping[str, list[int]],
    measured: Callable[[PreTrainedModel], float],
) -> dict[str, list[float]]:
    """For groups that are alike and numbers of components, the share of the dense time, once those before are gone."""
    smaller, share, shares = eager_copy(model).eval(), 1.0, dict[str, list[float]]()
    for alike in found:
        shares[alike.key] = [share]
        for count in reversed(grids[alike.key][:-1]):
            keep_first(smaller, alike, count)
            share = measured(smaller)
            shares[alike.key].insert(0, share)
    return shares


def shares_between(
    model: PreTrainedModel,
    found: Iterable[Alike],
    shares: Mapping[str, list[float]],
    measured: Callable[[PreTrainedModel], float],
) -> dict[str, float]:
    """For groups that read others, the share of the dense time that goes with either.

    It is what they save by themselves beyond what they save once the others are gone.
    """
    between = {}
    for alike in found:
        if alike.depth:
            without = eager_copy(model).eval()
            keep_first(without, alike, 0)
            saved = shares[alike.key][-1] - shares[alike.key][0]
            between[alike.key] = max(0.0, 1 - measured(without) - saved)
    return between


def seconds_of_one(
    alike: Alike, counts: Sequence[int], passes: np.ndarray, shared: Mapping[str, float]
) -> list[float]:
    """Seconds of one group by number of components, from those of passes once what it reads is gone.

    Args:
        alike (`Alike`): The groups.
        counts (`Sequence[int]`): The numbers.
        passes (`np.ndarray`): Seconds of a pass with each.
        shared (`Mapping[str, float]`): Seconds that go with the groups that are read as well.
    """
    common = shared.get(alike.key, 0.0) * np.array(counts) / alike.components
    return (rising((passes - passes[0]) / len(alike.layers)) + common).tolist()


def shares_of_narrower(
    model: PreTrainedModel, finer: Sequence[str], widths: Sequence[int], measured: Callable[[PreTrainedModel], float]
) -> list[float]:
    """For every width, the share of the dense model's time."""
    narrower, shares = eager_copy(model).eval(), [1.0]
    for width in reversed(widths[:-1]):
        keep_first_of_parts(narrower, finer, width)
        shares.insert(0, measured(narrower))
    return shares


def of_whole_parts(
    finer: Sequence[str], widths: list[int], passes: list[float], shares: Mapping[str, list[float]]
) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """For each width, the share of a group's seconds, from the shares of whole passes."""
    if not finer:
        return {}, {}
    whole = KINDS[finer[0]].instead_of
    assert whole is not None  # It has finer kinds.
    spent = sum(of_set[-1] - of_set[0] for key, of_set in shares.items() if key.partition("/")[0] == whole)
    spent = max(spent, np.finfo(float).tiny)
    left = rising(np.clip([1 - (1 - share) / spent for share in passes], 0, 1)) if len(passes) > 1 else np.ones(1)
    return {whole: widths}, {whole: (1 - (left[-1] - left)).tolist()}


def keep_first_of_parts(model: PreTrainedModel, kinds: Sequence[str], width: int) -> None:
    """Cuts all parts of every layer of a model down to their first components, in place."""
    removed: dict[str, dict[int, list[int]]] = {kind: {} for kind in kinds}
    for group in find_groups(model, kinds):
        if group.runs is not None:
            ends = zip(accumulate(group.runs.left), group.runs.left, strict=True)
            gone = [range(end - max(left - width, 0), end) for end, left in ends]
            removed[group.kind.name][group.layer] = [position for run in gone for position in run]
    apply_plan(model, PruningPlan.for_model(model, **removed))  # type: ignore[arg-type]


def keep_first(model: PreTrainedModel, alike: Alike, count: int) -> None:
    """Cuts groups of a model that are alike down to their first components, in place."""
    groups = [group for group in find_groups(model, [alike.kind.name]) if group.layer in alike.layers]
    removed = {group.layer: list(group.kept[count:]) for group in groups}
    apply_plan(model, PruningPlan.for_model(model, **{alike.kind.name: removed}))  # type: ignore[arg-type]
