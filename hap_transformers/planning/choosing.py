"""Chooses the units whose removal costs least, and the implants that replace some of them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..components.groups import Group
from ..surgery.shared_weights import counted_twice, spared
from .budgets import Budget
from .settings import PlanningSettings


# Rank of a linear implant over the number of components that it replaces; with a rank for each nothing would be saved.
IMPLANT_RANK = 0.5


@dataclass
class Unit:
    """Components of a group, or of several groups of a layer, that go together.

    Args:
        components (`dict[int, list[int]]`): By the place of a group among all groups, positions of its components.
        place (`int`): Its place in the order of removal of these groups.
        score (`float`): What it is ranked by.
        harm (`float`): The sum of its components' scores.
        saves (`float`): What its removal saves after those before it.
    """

    components: dict[int, list[int]]
    place: int
    score: float
    harm: float
    saves: float

    @property
    def group(self) -> int:
        """The place of the first of its groups."""
        return min(self.components)


def ranked_in_runs(units: Sequence[Unit]) -> list[Unit]:
    """Ranks units that go one after the other by the harm per saving of the run that each belongs to.

    A narrow block takes nearly as long as a wide one, so the last units save what the first do not. The units'
    cumulative harm over their cumulative savings has a lower convex hull; the units of each of its edges are a run,
    and its slope is their score. So a run goes as a whole if it goes at all, unless the budget is met before its end.

    Args:
        units (`Sequence[Unit]`): The units, in the order of removal.

    Returns:
        `list[Unit]`: The same units with these scores, which never fall.
    """
    runs: list[_Run] = []
    for unit in units:
        run = _Run(unit.harm, unit.saves, [unit])
        while runs and runs[-1].price >= run.price:
            before = runs.pop()
            run = _Run(before.harm + run.harm, before.saves + run.saves, before.units + run.units)
        runs.append(run)
    return [replace(unit, score=run.price) for run in runs for unit in run.units]


@dataclass
class _Run:
    """Units that go one after the other, their harm, and what they save together."""

    harm: float
    saves: float
    units: list[Unit]

    @property
    def price(self) -> float:
        """Harm over savings."""
        return self.harm / max(self.saves, sys.float_info.min)


def cheapest(
    units: Sequence[Unit], to_save: float, groups: Sequence[Group], budget: Budget, settings: PlanningSettings
) -> tuple[list[Unit], dict[int, int]]:
    """The units to remove, lowest score first, and the ranks of implants.

    Of the units chosen for removal, the most sensitive share is replaced by implants: linear ones of half the rank, or
    one for one by cheaper components. Further units are removed to pay for them. If even all units do not pay, there
    are no implants. Units that need not go, because the last ones are large, stay.

    Args:
        units (`Sequence[Unit]`): What can go.
        to_save (`float`): What must be saved, in the budget's measure.
        groups (`Sequence[Group]`): All groups of the model.
        budget (`Budget`): Costs of components.
        settings (`PlanningSettings`): The share of implants, and the multiples that ranks must keep.

    Returns:
        `tuple[list[Unit], dict[int, int]]`: The units, and the rank by the place of a group.
    """
    ranking = sorted(units, key=lambda unit: (unit.score, unit.group, unit.place))
    removed = _without_spare(ranking[: _fewest(ranking, {}, to_save, groups, budget)], to_save, budget)
    ranks = _ranks(removed, groups, settings)
    count = _fewest(ranking, ranks, to_save, groups, budget) if ranks else None
    if count is None:
        return removed, {}
    return ranking[:count], ranks


def _without_spare(removed: list[Unit], to_save: float, budget: Budget) -> list[Unit]:
    """Leaves out units without which enough is saved, the most sensitive first."""
    if budget.pairs or not budget.linear:  # What a unit saves depends on others.
        return removed
    spare = sum(unit.saves for unit in removed) - to_save
    kept: list[Unit] = []
    needed: set[int] = set()  # Groups of which a later unit goes.
    for unit in reversed(removed):
        if needed.isdisjoint(unit.components) and unit.saves <= spare:
            spare -= unit.saves
        else:
            needed |= unit.components.keys()
            kept.append(unit)
    return kept[::-1]


def _fewest(
    ranking: Sequence[Unit], ranks: dict[int, int], to_save: float, groups: Sequence[Group], budget: Budget
) -> int | None:
    """How many units must go to save enough beside some ranks."""
    gone, saved = [0] * len(groups), 0.0

    def price(place: int, rank: int) -> float:
        left, cost = groups[place].num_components - gone[place], budget.costs[place]
        return cost(left + rank) - cost(left)

    for count in range(len(ranking) + 1):
        if count:
            saved += ranking[count - 1].saves
            for place, components in ranking[count - 1].components.items():
                gone[place] += len(components)
        fits = all(rank <= gone[place] for place, rank in ranks.items())
        lost = [count - ranks.get(place, 0) for place, count in enumerate(gone)]
        left = [group.num_components - count for group, count in zip(groups, lost, strict=True)]
        spent = sum(price(place, rank) for place, rank in ranks.items()) + counted_twice(budget.pairs, lost)
        spent -= spared(budget.filters, ranks, left)
        if fits and saved - spent >= to_save:
            return count
    return None


def _ranks(removed: Sequence[Unit], groups: Sequence[Group], settings: PlanningSettings) -> dict[int, int]:
    """For the places of groups that get an implant, its rank."""
    of_kinds = [unit for unit in removed if groups[unit.group].kind.implant is not None]
    replaceable = [unit for unit in of_kinds if groups[unit.group].implantable is not None]
    if settings.implant_ratio and of_kinds and not replaceable:
        kind = groups[of_kinds[0].group].kind
        raise ValueError(
            f"implant_ratio={settings.implant_ratio}, but no {kind.name} that go can be replaced by implants: these "
            f"need {kind.implant_needs}. Set implant_ratio=0."
        )
    total = sum(len(unit.components[unit.group]) for unit in replaceable)
    replaced: dict[int, int] = {}
    for unit in reversed(replaceable):  # The most sensitive first.
        count = len(unit.components[unit.group])
        if sum(replaced.values()) + count > settings.implant_ratio * total:
            break
        replaced[unit.group] = replaced.get(unit.group, 0) + count
    ranks = {}
    for place, count in replaced.items():
        multiple = settings.step_of(groups[place].kind)  # Widths stay multiples.
        share = IMPLANT_RANK if groups[place].kind.linear_implants else 1.0
        ranks[place] = min(count, multiple * max(1, round(share * count / multiple)))
    return ranks
