"""The parameters that a plan removes."""

from collections.abc import Sequence

from ..components.groups import Group, by_kind
from .shared_weights import counted_twice, shared_by_pairs, smaller_filters, spared


def parameters_removed(groups: Sequence[Group], left: Sequence[int], ranks: Sequence[int]) -> int:
    """The parameters that a model loses as it is.

    Args:
        groups (`Sequence[Group]`): All its groups.
        left (`Sequence[int]`): The components, or ranks of implants, that each of them keeps.
        ranks (`Sequence[int]`): The ranks of implants among them.
    """
    now = sum(group.num_components * group.parameters_per_component() for group in groups)
    return now - _kept(groups, left) + _in_shared_weights(groups, left, ranks)


def parameters_saved(groups: Sequence[Group], left: Sequence[int], ranks: Sequence[int]) -> dict[str, int]:
    """By kind, the parameters that a model has less than without the kind's removals; arguments as above."""
    saved = {}
    for kind in by_kind(groups):
        places = [place for place, group in enumerate(groups) if group.kind is kind]
        members, stay = [groups[place] for place in places], [left[place] for place in places]
        implanted = [ranks[place] for place in places]
        now = _kept(members, [group.num_components for group in members])
        if fewer := now - _kept(members, stay) + _in_shared_weights(members, stay, implanted):
            saved[kind.name] = fewer
    return saved


def _kept(groups: Sequence[Group], left: Sequence[int]) -> int:
    """Parameters of so many components of each group."""
    return sum(group.parameters_with(count) for group, count in zip(groups, left, strict=True))


def _in_shared_weights(groups: Sequence[Group], left: Sequence[int], ranks: Sequence[int]) -> int:
    """Parameters that go with smaller filters, less those that components of two groups have in common."""
    gone = [group.num_components - count for group, count in zip(groups, left, strict=True)]
    smaller = spared(smaller_filters(groups), dict(enumerate(ranks)), left)
    return round(smaller - counted_twice(shared_by_pairs(groups), gone))
