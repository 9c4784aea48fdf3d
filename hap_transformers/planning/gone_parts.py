"""Parts that are gone as a whole: a head without value dimensions has no use for its query/key dimensions."""

from collections.abc import Callable, Mapping, Sequence

import torch

from ..components.groups import Group
from .choosing import Unit


# Layer, and place in it.
Part = tuple[int, int]
# For the place of a group, its scores and its components in the order of removal.
Scored = Mapping[int, tuple[torch.Tensor, torch.Tensor]]


def parts_without(groups: Sequence[Group], removed: Sequence[Unit]) -> set[Part]:
    """The parts that would have none left of the components that others of the same part need.

    Args:
        groups (`Sequence[Group]`): All groups.
        removed (`Sequence[Unit]`): What shall go.
    """
    needed = {group.kind.needs for group in groups} - {None}
    found: set[Part] = set()
    for place, group in enumerate(groups):
        if group.runs is None or group.kind.name not in needed:
            continue
        gone = {position for unit in removed for position in unit.components.get(place, ())}
        left = {part for position, part in enumerate(group.runs.of_each()) if position not in gone}
        found |= {(group.layer, part) for part in group.runs.places_left() - left}
    return found


def freed_with(
    groups: Sequence[Group], scored: Scored, costs: Sequence[Callable[[int], float]]
) -> dict[int, list[float]]:
    """What parts save that go as a whole by components that have no scores, and go only with others.

    Args:
        groups (`Sequence[Group]`): All groups.
        scored (`Mapping[int, tuple[torch.Tensor, torch.Tensor]]`): Scores, and the order of removal, by place.
        costs (`Sequence[Callable[[int], float]]`): For each group, the cost of so many of its components.

    Returns:
        `dict[int, list[float]]`: By place of a group without whose components a part is gone, for each part.
    """
    freed: dict[int, list[float]] = {}
    for place in scored:
        for other, cost in zip(groups, costs, strict=True):
            if other.runs is None or (other.kind.needs, other.layer) != (groups[place].kind.name, groups[place].layer):
                continue
            if not any(groups[own] is other for own in scored):
                count = other.num_components
                freed[place] = [cost(count) - cost(count - own) for own in other.runs.left]
    return freed


def positions_of(group: Group, parts: set[Part]) -> list[int]:
    """Positions of a group's components that belong to some parts."""
    owners = [] if group.runs is None else group.runs.of_each()
    return [position for position, part in enumerate(owners) if (group.layer, part) in parts]


def scored_without(scored: Scored, groups: Sequence[Group], parts: set[Part]) -> Scored:
    """The same scores, but what belongs to parts that are gone costs nothing and goes first."""
    if not parts:
        return scored
    changed = dict(scored)
    for place, (values, order) in scored.items():
        if free := positions_of(groups[place], parts):
            costs = values.clone()
            costs[free] = 0
            rest = order[~torch.isin(order, torch.tensor(free))]
            changed[place] = costs, torch.cat([torch.tensor(free), rest])
    return changed
