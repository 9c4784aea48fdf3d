"""The parameters that a plan removes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..components.groups import Group, by_kind
from .shared_weights import counted_twice, shared_by_pairs, smaller_filters, spared


if TYPE_CHECKING:
    from .plan import PruningPlan


def parameters_removed(plan: "PruningPlan", groups: Sequence[Group]) -> int:
    """The parameters that a model of these groups loses as it is."""
    left = [plan.left_in(group) for group in groups]
    now = sum(group.num_components * group.parameters_per_component() for group in groups)
    return now - _kept(groups, left) + _in_shared_weights(plan, groups, left)


def parameters_saved(plan: "PruningPlan", groups: Sequence[Group]) -> dict[str, int]:
    """By kind, the parameters that a model of these groups has less than without the kind's removals."""
    saved = {}
    for kind, members in by_kind(groups).items():
        left = [plan.left_in(group) for group in members]
        now = _kept(members, [group.num_components for group in members])
        if fewer := now - _kept(members, left) + _in_shared_weights(plan, members, left):
            saved[kind.name] = fewer
    return saved


def _kept(groups: Sequence[Group], left: Sequence[int]) -> int:
    """Parameters of so many components of each group."""
    return sum(group.parameters_with(count) for group, count in zip(groups, left, strict=True))


def _in_shared_weights(plan: "PruningPlan", groups: Sequence[Group], left: Sequence[int]) -> int:
    """Parameters that go with smaller filters, less those that components of two groups have in common."""
    gone = [group.num_components - count for group, count in zip(groups, left, strict=True)]
    ranks = {place: plan.rank_for(group) for place, group in enumerate(groups)}
    return round(spared(smaller_filters(groups), ranks, left) - counted_twice(shared_by_pairs(groups), gone))
