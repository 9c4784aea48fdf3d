"""What a model's components cost, in each measure that a budget can be a share of."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from operator import mul
from typing import Any

import torch
from torch.nn import Module
from transformers import PreTrainedModel

from ..components.groups import KINDS, Group, find_groups, layers, of_kind
from ..components.projections import Projection
from ..components.runs import Runs
from ..components.structure import recorded_structure
from ..efficiency import count_encoder_parameters, count_flops, count_flops_by_module, count_parameters
from ..surgery.shared_weights import Filters, Pairs, counted_twice, shared_by_pairs, smaller_filters
from .latency_table import LatencyTable


# From the components that every part of a layer has left, by kind.
JointCost = Callable[[Mapping[str, Sequence[int]]], float]


@dataclass
class Budget:
    """The costs of a model's encoder in one measure.

    Args:
        dense (`float`): What the encoder costs before any pruning.
        now (`float`): What it costs as it is.
        costs (`list[Callable[[int], float]]`): For each group, the cost of so many of its components.
        outside (`float`): What the rest of the model costs.
        linear (`bool`, *optional*, defaults to `True`): Whether all components of a group cost the same.
        whole_parts (`dict[int, float]`, *optional*): For the places of groups whose components are parts of others,
            what such a part, as wide as it is, costs beside its components for as long as it has any, as attention
            between projections does for a head.
        joint (`dict[tuple[int, ...], JointCost]`, *optional*): Costs of several groups of a layer together, by their
            places. They hold in place of those in `costs`.
        pairs (`dict[tuple[int, int], float]`, *optional*): For the places of two groups of which one reads what writes
            the other, what a component of either costs together. It is part of both groups' `costs`, as it is while
            no component of the other has gone.
        uneven (`set[int]`, *optional*): Places of groups whose first components save less than others.
        filters (`Filters`, *optional*): What implants of smaller filters cost less than components.
    """

    dense: float
    now: float
    costs: list[Callable[[int], float]]
    outside: float
    linear: bool = True
    whole_parts: dict[int, float] = field(default_factory=dict)
    joint: dict[tuple[int, ...], JointCost] = field(default_factory=dict)
    pairs: Pairs = field(default_factory=dict)
    uneven: set[int] = field(default_factory=set)
    filters: Filters = field(default_factory=dict)

    def of_parts(self, groups: Sequence[Group], parts: set[tuple[int, int]]) -> float:
        """What some parts, each a layer and a place in it, cost beside their components."""
        return sum(
            cost for place, cost in self.whole_parts.items() for layer, _ in parts if groups[place].layer == layer
        )


@dataclass
class Surroundings:
    """What costs are measured with.

    Args:
        model (`PreTrainedModel`): The model; it is only read.
        groups (`Sequence[Group]`): All its groups.
        inputs (`Mapping[str, Any]`, *optional*): The batch whose FLOPs count.
        latency_table (`LatencyTable`, *optional*): Seconds by number of components.
        joint (`Sequence[Sequence[int]]`, *optional*): Places of groups, layer by layer, to know costs together of.
    """

    model: PreTrainedModel
    groups: Sequence[Group]
    inputs: Mapping[str, Any] | None = None
    latency_table: LatencyTable | None = None
    joint: Sequence[Sequence[int]] = ()


def make_budget(name: str, given: Surroundings) -> Budget:
    """The costs of a model in one measure.

    Args:
        name (`str`): `"params"`, `"model"`, `"flops"`, `"latency"`, or the name of a kind, whose components are
            counted.
        given (`Surroundings`): The model, and what its costs are measured with.

    Raises:
        ValueError: If the budget is unknown, or `inputs` or `latency_table` are missing or do not fit.
    """
    if name in KINDS:
        return _counting_budget(name, given)
    if name not in _BUDGETS:
        raise ValueError(f"Unknown budget '{name}'; choose one of {', '.join((*_BUDGETS, *KINDS))}.")
    return _BUDGETS[name](given)


def dense_counts(model: PreTrainedModel, groups: Sequence[Group]) -> list[int]:
    """Components that each group had before any pruning."""
    return [group.num_components for group in _dense_groups(model, groups)]


def _dense_groups(model: PreTrainedModel, groups: Sequence[Group]) -> Sequence[Group]:
    """The groups as they were before any pruning."""
    original = dense_like(model, torch.device("meta"))
    return groups if original is model else _same_groups(original, groups)


def dense_like(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A model whose layers have the sizes and dtype that a pruned one's had, with other weights; a dense model itself.

    It is of the class that Transformers has. What is around the layers, or how the model was loaded, may differ.
    """
    numbered = [f"pruned_{kind.name}" for kind in KINDS.values() if kind.keeps_numbers]
    if recorded_structure(model.config) is None and not any(getattr(model.config, n, None) for n in numbered):
        return model
    config = deepcopy(model.config)
    for attribute in numbered:
        setattr(config, attribute, {})
    if recorded_structure(config) is not None:
        del config.quantization_config
    shipped = (base for base in type(model).__mro__ if base.__module__.startswith("transformers."))
    # A custom class may have only a base without layers there.
    shipped = (base for base in shipped if issubclass(base, PreTrainedModel) and base.forward is not Module.forward)
    with device:
        return next(shipped, type(model))(config).to(model.dtype)


def _same_groups(model: PreTrainedModel, groups: Sequence[Group]) -> list[Group]:
    """A model's groups of the kinds that some groups of another one have."""
    return find_groups(model, {group.kind.name for group in groups})


def _linear_budget(
    dense: float,
    whole: float,
    costs: list[float],
    before: Sequence[Group],
    now: Sequence[Group],
    whole_parts: dict[int, float] | None = None,
    joint: Sequence[Sequence[int]] = (),
    pairs: Pairs | None = None,
    filters: Filters | None = None,
) -> Budget:
    """A budget in which every component of a group costs the same.

    Args:
        dense (`float`): What the dense encoder costs.
        whole (`float`): What the model as it is costs, with all that is around the encoder.
        costs (`list[float]`): What a component of each group of the dense model costs.
        before (`Sequence[Group]`): The dense model's groups.
        now (`Sequence[Group]`): The model's groups as they are.
        whole_parts (`dict[int, float]`, *optional*): What each part of the dense model costs beside its components.
        joint (`Sequence[Sequence[int]]`, *optional*): As in [`Surroundings`].
        pairs, filters: As in [`Budget`].
    """
    gone, pairs = [old.num_components - new.num_components for old, new in zip(before, now, strict=True)], pairs or {}
    present = dense - sum(cost * count for cost, count in zip(costs, gone, strict=True)) + counted_twice(pairs, gone)
    for (first, second), price in pairs.items():
        costs[first] -= price * gone[second]
        costs[second] -= price * gone[first]
    parts = {}
    for place, cost in (whole_parts or {}).items():
        runs = now[place].runs
        assert runs is not None  # As in the dense model.
        count, size = runs.size_left(runs.of_kinds)
        present -= cost * (len(runs.left) - count * size / runs.whole.head_size)
        parts[place] = cost * size / runs.whole.head_size
    together: dict[tuple[int, ...], JointCost] = {}
    for places in joint:
        runs = now[places[0]].runs
        assert runs is not None
        prices = {now[place].kind.name: costs[place] for place in places}
        between = sum(cost for place, cost in (whole_parts or {}).items() if place in places)
        together[tuple(places)] = partial(_linear_cost, runs, prices, between)
        parts = {place: cost for place, cost in parts.items() if place not in places}
    now_costs: list[Callable[[int], float]] = [partial(mul, cost) for cost in costs]
    return Budget(
        dense, present, now_costs, whole - present, True, parts, together, pairs=dict(pairs), filters=filters or {}
    )


def _linear_cost(runs: Runs, prices: Mapping[str, float], between: float, left: Mapping[str, Sequence[int]]) -> float:
    """What the parts of a layer cost, of which each and all components do, and what is around them for each part."""
    count, size = runs.size_left(left)
    return (
        sum(price * sum(left[kind]) for kind, price in prices.items()) + between * count * size / runs.whole.head_size
    )


def _counting_budget(kind: str, given: Surroundings) -> Budget:
    original = dense_like(given.model, torch.device("meta"))
    if KINDS[kind].made_of:
        return _budget_of_wholes(kind, given, original)
    before = _same_groups(original, given.groups)
    costs = [float(group.kind.name == kind) for group in before]
    dense = sum(cost * group.num_components for cost, group in zip(costs, before, strict=True))
    whole = float(sum(group.num_components for group in of_kind(given.groups, kind)))
    return _linear_budget(dense, whole, costs, before, given.groups)


def _budget_of_wholes(kind: str, given: Surroundings, original: PreTrainedModel) -> Budget:
    """Counts components that are made of others: one for the first group of each that has anything left."""
    dense, now = (find_groups(model, [kind]) for model in (original, given.model))
    present = {group.layer for group in now if group.num_components}
    costs: list[Callable[[int], float]] = []
    for group in given.groups:
        counted = group.block in present and group.num_components and not group.kind.outside
        costs.append(partial(mul, 1 / group.num_components if counted else 0.0))
        present -= {group.block} if counted else set()
    return Budget(float(len(dense)), float(sum(group.num_components for group in now)), costs, 0.0)


def _parameter_budget(given: Surroundings) -> Budget:
    original = dense_like(given.model, torch.device("meta"))
    before = _same_groups(original, given.groups)
    return _of_parameters(given, before, float(count_encoder_parameters(original)))


def _model_budget(given: Surroundings) -> Budget:
    original = dense_like(given.model, torch.device("meta"))
    before = _same_groups(original, given.groups)
    budget = _of_parameters(given, before, float(count_parameters(original)))
    for place, group in enumerate(given.groups):
        if group.whole is not None:
            present = group.num_components * group.parameters_per_component()
            _take_in(budget, place, group, group.parameters_with, group.parameters_with(group.whole), present)
    return budget


def _of_parameters(given: Surroundings, before: Sequence[Group], dense: float) -> Budget:
    """A budget of parameters, in which components outside the layers cost nothing."""
    costs = [0.0 if group.kind.outside else float(group.parameters_per_component()) for group in before]
    pairs, filters, whole = shared_by_pairs(before), smaller_filters(before), count_parameters(given.model)
    return _linear_budget(dense, whole, costs, before, given.groups, joint=given.joint, pairs=pairs, filters=filters)


def _take_in(
    budget: Budget, place: int, group: Group, cost: Callable[[int], float], dense: float, present: float
) -> None:
    """Adds a group that may have a reader which the dense model has not.

    Args:
        budget (`Budget`): The budget without the group; changed in place.
        place (`int`): The place of the group.
        group (`Group`): The group.
        cost (`Callable`): What so many components cost once a plan is applied.
        dense (`float`): What the group costs in the dense model.
        present (`float`): What it costs as it is.
    """
    budget.costs[place] = cost
    budget.now += cost(group.num_components) - dense
    budget.outside -= present - dense
    budget.uneven.add(place)


def _flop_budget(given: Surroundings) -> Budget:
    if given.inputs is None:
        raise ValueError("budget='flops' depends on the length of inputs; pass a batch as `inputs`.")
    original = dense_like(given.model, given.model.device)
    before = _same_groups(original, given.groups)
    flops = count_flops_by_module(original, given.inputs)
    costs = [_flops(group, flops) / group.num_components for group in before]
    dense = float(sum(flops.get(layer, 0) for layer in set(layers(original))))
    needed = {kind.needs for kind in KINDS.values()}
    between = {place: _flops_between(group, flops) for place, group in enumerate(before) if group.kind.name in needed}
    whole = count_flops(given.model, given.inputs)

    def whole_of(projection: Projection) -> float:
        return flops.get(projection.module, 0)

    pairs, filters = shared_by_pairs(before, whole_of), smaller_filters(before, whole_of)
    budget = _linear_budget(dense, whole, costs, before, given.groups, between, given.joint, pairs, filters)
    present_flops = count_flops_by_module(given.model, given.inputs) if any(g.is_split for g in given.groups) else {}
    for place, group in enumerate(given.groups):
        if group.is_split:  # Looking up takes none, the map behind it does.
            present = float(present_flops.get(group.reader.module, 0))
            cost = partial(_less_if_whole, group, present / max(group.num_components, 1))
            _take_in(budget, place, group, cost, 0.0, present)
    return budget


def _less_if_whole(group: Group, price: float, count: int) -> float:
    """What so many components of a group cost whose reader is there only if some have gone."""
    return 0.0 if count == group.whole else price * count


def _flops_between(group: Group, flops: Mapping[Module, int]) -> float:
    """FLOPs of one of the parts that components belong to, beside those of its projections."""
    assert group.runs is not None and group.core is not None  # Others need components of such groups only.
    whole = group.runs.whole
    inside = {projection.module for projection in whole.projections} & set(group.core.modules())
    return (flops.get(group.core, 0) - sum(flops.get(module, 0) for module in inside)) / whole.original


def _flops(group: Group, flops: Mapping[Module, int]) -> int:
    """FLOPs of all that shrinks with a group: its projections and what lies between them."""
    if group.runs is not None:  # What lies between works with whole heads.
        return round(sum(flops.get(p.module, 0) / p.parts for p in group.projections))
    modules: set[Module] = {projection.module for projection in group.projections}
    if group.core is not None:
        modules = {group.core} | (modules - set(group.core.modules()))
    return sum(flops.get(module, 0) for module in modules)


def _latency_budget(given: Surroundings) -> Budget:
    table = given.latency_table
    if table is None:
        raise ValueError(
            "budget='latency' needs seconds measured on your device; pass latency_table=LatencyTable.measure(...)."
        )
    before = _dense_groups(given.model, given.groups)
    dense = [group.num_components for group in before]
    inside = [place for place, group in enumerate(given.groups) if not group.kind.outside]
    table.validate(given.model, [given.groups[place] for place in inside], [dense[place] for place in inside])
    joint: dict[tuple[int, ...], JointCost] = {}
    whole = now = 0.0
    for places in given.joint:
        runs = given.groups[places[0]].runs
        assert runs is not None
        joint[tuple(places)] = partial(_seconds, table, runs)
        whole += table.cost(runs.whole.kind.name, runs.whole.original)
        now += joint[tuple(places)](runs.of_kinds)
    together = {place for places in joint for place in places}
    costs: list[Callable[[int], float]] = [
        partial(mul, 0.0) if group.kind.outside else partial(table.cost, group.kind.name, layer=group.layer)
        for group in given.groups
    ]
    for place, (group, cost, count) in enumerate(zip(given.groups, costs, dense, strict=True)):
        if place not in together:
            whole += cost(count)
            now += cost(group.num_components)
    between = {
        writer.module: table.shared.get(table.key(group.kind.name, group.layer), 0.0)
        for group in before
        for writer in group.writers
    }
    pairs = shared_by_pairs(before, lambda reader: between.get(reader.module, 0.0))
    gone = [count - group.num_components for count, group in zip(dense, given.groups, strict=True)]
    twice = counted_twice(pairs, dense)  # Both groups' costs have it.
    now += counted_twice(pairs, gone) - twice
    for (first, second), price in pairs.items():
        for place, other in ((first, second), (second, first)):
            costs[place] = partial(_less, costs[place], price * gone[other])
    return Budget(whole - twice, now, costs, table.outside, linear=False, joint=joint, pairs=dict(pairs))


def _less(cost: Callable[[int], float], rate: float, count: int) -> float:
    """A cost without what has gone with components of another group."""
    return cost(count) - rate * count


def _seconds(table: LatencyTable, runs: Runs, left: Mapping[str, Sequence[int]]) -> float:
    """What the parts of a layer and all around them take."""
    return table.cost(runs.whole.kind.name, *runs.size_left(left))


_BUDGETS: dict[str, Callable[[Surroundings], Budget]] = {
    "params": _parameter_budget,
    "model": _model_budget,
    "flops": _flop_budget,
    "latency": _latency_budget,
}
