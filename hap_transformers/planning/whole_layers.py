"""Chooses whole layers, each of which goes with all that it is made of."""

import math
import sys
from collections.abc import Iterator, Sequence

from ..components.groups import Group
from .budgets import Budget
from .choosing import Unit
from .gone_parts import Scored
from .settings import PlanningSettings


def choose_layers(
    whole: Sequence[Group], scored: Scored, groups: Sequence[Group], budget: Budget, settings: PlanningSettings
) -> list[Unit]:
    """The layers that go, lowest score first: as many as come nearest to the budget.

    One layer stays, of an encoder-decoder one of each part.

    Args:
        whole (`Sequence[Group]`): The layers.
        scored (`Mapping[int, tuple[torch.Tensor, torch.Tensor]]`): Scores, and the order of removal, by place in
            `whole`.
        groups (`Sequence[Group]`): All groups that layers are made of.
        budget (`Budget`): Costs of their components.
        settings (`PlanningSettings`): How much goes, and how layers are ranked.

    Raises:
        ValueError: If that would not be enough.
    """
    units = sorted(_units(whole, scored, groups, budget, settings), key=lambda unit: (unit.score, unit.group))
    last = {groups[unit.group].decoded: unit for unit in units}
    to_save = budget.now - (1 - settings.ratio) * budget.dense
    removed: list[Unit] = []
    for unit in [*(unit for unit in units if unit not in last.values()), *last.values()]:
        # It comes nearer with this one.
        if to_save <= unit.saves / 2 + 1e-9 * budget.dense:
            return removed
        if unit in last.values():
            break
        removed.append(unit)
        to_save -= unit.saves
    reachable = 1 - (budget.now - sum(unit.saves for unit in removed)) / budget.dense
    stays = "one layer stays" + (", of the encoder and of the decoder," if len(last) > 1 else ",")
    raise ValueError(
        f"ratio={settings.ratio} of budget='{settings.budget}' cannot be met by whole layers: {stays} so at "
        f"most {math.floor(1000 * reachable) / 1000} can go. Lower the ratio, or name other components."
    )


def _units(
    whole: Sequence[Group], scored: Scored, groups: Sequence[Group], budget: Budget, settings: PlanningSettings
) -> Iterator[Unit]:
    """All that is left of each layer."""
    for place, (scores, _) in scored.items():
        if len(scores):
            members = _members(whole[place], groups)
            components = {i: list(range(groups[i].num_components)) for i in members if groups[i].num_components}
            harm, saves = float(scores.sum()), sum(_savings(members, groups, budget))
            score = harm / max(saves, sys.float_info.min) if settings.weigh_costs else harm
            yield Unit(components, 0, score, harm, saves)


def _members(layer: Group, groups: Sequence[Group]) -> list[int]:
    """Places of the groups that a layer is made of."""
    made_of = {(group.kind.name, group.layer) for group in layer.members}
    return [place for place, group in enumerate(groups) if (group.kind.name, group.layer) in made_of]


def _savings(members: Sequence[int], groups: Sequence[Group], budget: Budget) -> Iterator[float]:
    """What is saved by removing all components of some groups, of those with joint costs together."""
    joint = {places: cost for places, cost in budget.joint.items() if not set(places).isdisjoint(members)}
    for places, together in joint.items():
        runs = groups[places[0]].runs
        assert runs is not None  # Only such groups have joint costs.
        none = {kind: [0] * len(left) for kind, left in runs.of_kinds.items()}
        yield together(runs.of_kinds) - together(none)
    for place in set(members).difference(*joint):
        cost = budget.costs[place]
        yield cost(groups[place].num_components) - cost(0)
