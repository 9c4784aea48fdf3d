"""Decides what to remove: `plan_pruning` turns a `Sensitivity` into a `PruningPlan`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..components.forwards import eager_model
from ..components.groups import KINDS, Group, Kind, by_kind, find_groups, kinds_in_use
from ..sensitivity import Sensitivity
from ..surgery.plan import PruningPlan, validate_basis
from ..surgery.plan_costs import parameters_saved
from ..surgery.shared_weights import counted_twice, spared
from .budgets import Budget, Surroundings, dense_counts, make_budget
from .choosing import Unit, cheapest, ranked_in_runs
from .even_parts import even_units, evened_layers
from .gone_parts import Part, Scored, freed_with, parts_without, positions_of, scored_without
from .kinds import validate_view
from .latency_table import LatencyTable
from .settings import PlanningSettings
from .uniform_layers import uniform_units
from .whole_layers import choose_layers


logger = logging.get_logger(__name__)


def plan_pruning(
    sensitivity: Sensitivity,
    model: PreTrainedModel,
    settings: PlanningSettings | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    latency_table: LatencyTable | None = None,
    **changes: Any,
) -> PruningPlan:
    """Chooses the components whose removal costs least accuracy for what it saves.

    Components of all layers and kinds are ranked together by score over cost, and removed from the lowest up until the
    budget is met. If a method's scores cannot be compared between kinds (`"gradient"`, `"magnitude"`, `"random"`),
    each kind is ranked separately and the same share of each is removed.

    Of a budget in seconds, the first components of a block may save little and the last ones much, because a narrow
    block takes nearly as long as a wide one. Components that save time only together are ranked together, so whole
    blocks go where narrower ones would not pay, and widths stop where the measured time steps down.

    Args:
        sensitivity (`Sensitivity`): Scores of the components that `model` has now. Kinds without scores stay whole.
        model (`PreTrainedModel`): The model to plan for; it is only read.
        settings (`PlanningSettings`, *optional*): How much is removed, and what may go.
        inputs (`Mapping[str, Any]`, *optional*): A batch of the length that the model shall serve. With it, the plan
            promises FLOPs.
        latency_table (`LatencyTable`, *optional*): Seconds measured on the device that the model shall run on. With
            it, the plan promises a latency.
        changes: Fields of [`PlanningSettings`] to set, such as `ratio=0.5, budget="flops"`.

    Returns:
        `PruningPlan`: What to remove, and what the model will cost then.

    Raises:
        ValueError: If a setting is out of range, the budget lacks `inputs` or `latency_table`, the table was measured
            in another mode than `latency_mode`, the scores are not finite, do not fit the model or are of another type
            of model or basis of its heads, or a floor stands in the way of the ratio.
        TypeError: If there is no such setting, or `sensitivity` is none.
    """
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(f"`sensitivity` is a {type(sensitivity).__name__}; give scores first, then the model.")
    settings = replace(settings or PlanningSettings(), **changes)
    if latency_table is not None:
        latency_table.validate_mode(settings.latency_mode)
    model = eager_model(model)
    if sensitivity.model_type not in ("", model.config.model_type):
        raise ValueError(
            f"The scores are of a '{sensitivity.model_type}', but {type(model).__name__} is a "
            f"'{model.config.model_type}'. Score this model."
        )
    groups = find_groups(model, kinds_in_use(model, sensitivity.scores))
    given = Surroundings(model, groups, inputs, latency_table)
    kinds = [settings.budget] if settings.budget in KINDS else list(sensitivity.scores)
    validate_basis(sensitivity.basis, model, sensitivity.scores)
    timed = settings if latency_table is None else replace(settings, budget="latency")
    validate_view([KINDS[name] for name in kinds if name in KINDS], timed)
    whole = find_groups(model, [name for name in kinds if name in KINDS and KINDS[name].made_of])
    scored = _scores_of(sensitivity, whole or groups, kinds)
    if whole:
        given.joint = _parts_by_layer(groups)
        removed = choose_layers(whole, scored, groups, make_budget(settings.budget, given), settings)
        implants, gone = dict[int, int](), set[Part]()
    else:
        removed, implants, gone = _choose(sensitivity, scored, given, settings)
    plan = PruningPlan.for_model(
        model,
        implants=_implants(implants, removed, groups),
        budget=settings.budget,
        ratio=settings.ratio,
        method=sensitivity.method,
        uniform=settings.uniform,
        **_numbers(removed, groups, gone),  # type: ignore[arg-type]
    )
    if settings.implant_ratio and removed and not plan.implants:
        logger.warning(
            f"The plan has no implants: implant_ratio={settings.implant_ratio} of what goes is less than one of the "
            "units that go together, or nothing is left to pay for them. Raise implant_ratio, or lower ratio."
        )
    plan.promise = _promise(plan, given)
    plan.saved = parameters_saved(groups, *plan.sizes_of(groups))
    return plan


def _choose(
    sensitivity: Sensitivity, scored: Scored, given: Surroundings, settings: PlanningSettings
) -> tuple[list[Unit], dict[int, int], set[Part]]:
    """What goes component by component, ranks of implants by the place of a group, and parts that go as a whole."""
    model, groups = given.model, given.groups
    evened = evened_layers(groups, scored) if settings.even_heads and sensitivity.comparable else []
    given.joint = evened
    budget = make_budget(settings.budget, given)
    floors = settings.floors(groups, dense_counts(model, groups), sensitivity.foresees_refit)
    if settings.uniform:
        floors = [max(floor, 1) for floor in floors]
    freed = freed_with(groups, scored, budget.costs)
    gone: set[Part] = set()
    while True:
        left = scored_without(scored, groups, gone)
        units = [unit for places in evened for unit in _even_units(places, groups, left, floors, budget)]
        alone = {
            place: _units(place, groups[place], left[place], floors[place], budget, settings, freed.get(place, ()))
            for place in left.keys() - {place for places in evened for place in places}
        }
        units += uniform_units(alone, groups, settings, model.config) if settings.uniform else chain(*alone.values())
        able = [floors[place] if place in scored else None for place in range(len(groups))]
        removed, implants = _chosen(units, groups, able, budget, settings, sensitivity.comparable, gone)
        if not (found := parts_without(groups, removed) - gone):
            return removed, implants, gone
        gone |= found


def _chosen(
    units: Sequence[Unit],
    groups: Sequence[Group],
    floors: Sequence[int | None],
    budget: Budget,
    settings: PlanningSettings,
    comparable: bool,
    gone: set[Part],
) -> tuple[list[Unit], dict[int, int]]:
    """What goes, and the ranks of implants by the place of a group, where some parts go as a whole."""
    to_save = budget.now - (1 - settings.ratio) * budget.dense - budget.of_parts(groups, gone)
    if settings.budget in KINDS:  # Whole components are counted.
        to_save = round(to_save)
    slack = 1e-9 * budget.dense
    lost = [0] * len(groups)
    for unit in units:
        for place, positions in unit.components.items():
            lost[place] += len(positions)
    saved = sum(unit.saves for unit in units)
    most = saved - counted_twice(budget.pairs, lost)
    # Parts save something more when the last of their components goes.
    others = parts_without(groups, units) - gone
    if to_save - slack > most + budget.of_parts(groups, others):
        left = [
            group.num_components - count - len(positions_of(group, gone))
            for group, count in zip(groups, lost, strict=True)
        ]
        raise _unreachable(most + budget.of_parts(groups, others), budget, settings, groups, floors, left)
    rankings = [units] if comparable else _apart(units, groups)
    removed: list[Unit] = []
    implants: dict[int, int] = {}
    for ranking in rankings:
        share = sum(unit.saves for unit in ranking) / saved if saved else 0.0
        chosen, ranks = cheapest(ranking, share * to_save - slack, groups, budget, settings)
        removed += chosen
        implants |= ranks
    return removed, implants


def _scores_of(
    sensitivity: Sensitivity, groups: Sequence[Group], kinds: Sequence[str]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """For the place of every group that can lose components, its scores and its components in the order of removal."""
    found = {}
    places = {id(group): place for place, group in enumerate(groups)}
    present = by_kind(groups)
    if unscored := [name for name in kinds or present if name not in sensitivity.scores]:
        raise ValueError(
            f"The sensitivity has no scores of {unscored[0]}; estimate it with components=['{unscored[0]}', ...]."
        )
    if missing := set(kinds) - {kind.name for kind in present}:
        raise ValueError(
            f"The sensitivity has scores of {', '.join(sorted(missing))}, the model has "
            f"{', '.join(kind.name for kind in present)}. Estimate the sensitivity of this model as it is now."
        )
    for kind, members in present.items():
        if kind.name not in kinds:
            continue
        layers = sensitivity.scores[kind.name]
        counts = [group.num_components for group in members]
        if [len(scores) for scores in layers] != counts:
            raise ValueError(
                f"The sensitivity has scores for {[len(scores) for scores in layers]} {kind.name} per layer, the "
                f"model has {counts}. Estimate the sensitivity of this model as it is now."
            )
        orders = sensitivity.order.get(kind.name, layers)
        for group, scores, order in zip(members, layers, orders, strict=True):
            if not torch.isfinite(scores).all():
                raise ValueError(
                    f"Layer {group.layer} has scores of {kind.name} that are not finite. Estimate them again; they "
                    "cannot be ranked."
                )
            found[places[id(group)]] = scores, torch.argsort(order, stable=True)
    return found


def _units(
    place: int,
    group: Group,
    scores: tuple[torch.Tensor, torch.Tensor],
    floor: int,
    budget: Budget,
    settings: PlanningSettings,
    freed: Sequence[float],
) -> list[Unit]:
    """What can go from a group, first unit first, in steps that leave multiples.

    Where its components are parts of others, `freed` is what each of these saves beside them once it has none.
    """
    values, order = scores
    owners, left = (group.runs.of_each(), list(group.runs.left)) if freed and group.runs else ([], [])
    count, cost, step = group.num_components, budget.costs[place], settings.step_of(group.kind)
    if not count:
        return []
    # A group's own average, so that units keep their order.
    weight = 1.0
    if settings.weigh_costs:
        weight = max((cost(count) - cost(0)) / count, torch.finfo(torch.float64).tiny)
    units: list[Unit] = []
    gone = 0
    while gone < count:
        size = (count - gone) % step or step
        # The first that go may cost more than they save, alone.
        while size < count - gone and cost(count - gone - size) > cost(count - gone):
            size += step
        if count - gone - size < floor:
            break
        components = order[gone : gone + size]
        score = float(values[components].mean()) / weight
        saves = cost(count - gone) - cost(count - gone - size)
        for part in [owners[position] for position in components.tolist()] if freed else ():
            left[part] -= 1
            saves += 0.0 if left[part] else freed[part]
        harm = float(values[components].sum())
        units.append(Unit({place: components.tolist()}, len(units), score, harm, saves))
        gone += size
    even = budget.linear and place not in budget.uneven
    return units if even or not settings.weigh_costs else ranked_in_runs(units)


def _even_units(
    places: Sequence[int], groups: Sequence[Group], scored: Scored, floors: Sequence[int], budget: Budget
) -> list[Unit]:
    """What can go from parts of a layer that keep equally many components."""
    step, floor = max(groups[place].kind.step for place in places), max(floors[place] for place in places)
    return even_units(places, groups, scored, floor, budget.joint[tuple(places)], step)


def _unreachable(
    most: float,
    budget: Budget,
    settings: PlanningSettings,
    groups: Sequence[Group],
    floors: Sequence[int | None],
    left: Sequence[int],
) -> ValueError:
    """The error of a budget that cannot be met.

    Args:
        most (`float`): What can be saved.
        budget (`Budget`): The budget.
        settings (`PlanningSettings`): How much was to go.
        groups (`Sequence[Group]`): The groups.
        floors (`Sequence[int]`): What each has to keep, or `None` where nothing may go.
        left (`Sequence[int]`): What each keeps at least, in the multiples that it goes down by.
    """
    reachable = 1 - (budget.now - most) / budget.dense
    kept: dict[Kind, list[tuple[int, int]]] = {}
    for group, floor, count in zip(groups, floors, left, strict=True):
        if floor is not None:
            kept.setdefault(group.kind, []).append((count, floor))
    words = [f"at least {max(least)[0]} {kind.name}" for kind, least in kept.items() if max(least)[0]]
    words += [f"all {kind.name}" for kind in by_kind(groups) if kind not in kept]
    because = f"every layer keeps {' and '.join(words)}, so " if words else ""
    steps = {
        f"{kind.singular}_multiple" for kind, least in kept.items() if any(count > floor for count, floor in least)
    }
    remedies = ["the ratio", "the floors", *sorted(steps & vars(settings).keys())]
    return ValueError(
        f"ratio={settings.ratio} of budget='{settings.budget}' cannot be met: {because}at most "
        f"{math.floor(1000 * reachable) / 1000} can go. The rest are floors and weights that belong to no component. "
        f"Lower {', '.join(remedies[:-1])} or {remedies[-1]}."
    )


def _apart(units: Sequence[Unit], groups: Sequence[Group]) -> list[list[Unit]]:
    """The units of each kind by themselves; none are of several."""
    kinds = dict.fromkeys(group.kind for group in groups)
    return [[unit for unit in units if groups[unit.group].kind == kind] for kind in kinds]


def _numbers(removed: Sequence[Unit], groups: Sequence[Group], gone: set[Part]) -> dict[str, dict[int, list[int]]]:
    """The numbers of the components that go, by kind and layer."""
    found: dict[str, dict[int, list[int]]] = {}
    for place, group in enumerate(groups):
        positions = {position for unit in removed for position in unit.components.get(place, ())}
        if positions := positions | set(positions_of(group, gone)):
            found.setdefault(group.kind.name, {})[group.layer] = [group.kept[position] for position in positions]
    return found


def _implants(
    ranks: Mapping[int, int], removed: Sequence[Unit], groups: Sequence[Group]
) -> dict[int, int | Sequence[int]]:
    """Implants by layer: the rank, or the numbers of the most sensitive components that go where they keep them."""
    found: dict[int, int | Sequence[int]] = {}
    for place, rank in ranks.items():
        group, own = groups[place], sorted((u for u in removed if place in u.components), key=lambda u: u.place)
        numbers = [group.kept[position] for unit in own for position in unit.components[place]]
        found[group.layer] = numbers[-rank:] if group.kind.keeps_numbers else rank
    return found


def _parts_by_layer(groups: Sequence[Group]) -> list[list[int]]:
    """The places of groups whose components are parts of others, layer by layer."""
    layers: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        if group.runs is not None:
            layers.setdefault(group.layer, []).append(place)
    return list(layers.values())


def _promise(plan: PruningPlan, given: Surroundings) -> dict[str, float]:
    """What the whole model will cost."""
    given = replace(given, joint=_parts_by_layer(given.groups))
    promise: dict[str, float] = {}
    measures = {"parameters": "model"}
    if given.inputs is not None:
        measures["flops"] = "flops"
    if given.latency_table is not None:
        measures["latency"] = "latency"
    for name, measure in measures.items():
        budget = make_budget(measure, given)
        total = budget.outside + budget.now
        for group, cost in zip(given.groups, budget.costs, strict=True):
            if group.runs is None:
                total += cost(plan.left_in(group)) - cost(group.num_components)
        left_in, ranks = plan.sizes_of(given.groups)
        lost = [group.num_components - count for group, count in zip(given.groups, left_in, strict=True)]
        total += counted_twice(budget.pairs, lost) - spared(budget.filters, dict(enumerate(ranks)), left_in)
        for places, joint in budget.joint.items():
            members = [given.groups[place] for place in places]
            runs = members[0].runs
            assert runs is not None
            left = {group.kind.name: plan.left_of_parts(group) for group in members}
            total += joint({**runs.of_kinds, **left}) - joint(runs.of_kinds)
        promise[name] = total if measure == "latency" else round(total)
    return promise
