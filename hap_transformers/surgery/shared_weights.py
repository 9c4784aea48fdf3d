"""Weights that belong to components of two groups: of one that reads them, and of one that writes them."""

from collections.abc import Callable, Mapping, Sequence

from ..components.groups import Group
from ..components.projections import Projection


# By the places of two groups, what a component of either has in common.
Pairs = Mapping[tuple[int, int], float]


def weights_in(projection: Projection) -> float:
    """The number of a projection's weights."""
    return projection.module.weight.numel()


def shared_by_pairs(groups: Sequence[Group], whole: Callable[[Projection], float] = weights_in) -> Pairs:
    """What a component of each of two groups costs together, where one group reads what writes the other.

    Args:
        groups (`Sequence[Group]`): The groups.
        whole (`Callable`, *optional*): Takes a projection, returns the cost of its weights; by default their number.
    """
    writers = {writer.module: place for place, group in enumerate(groups) for writer in group.writers}
    return {
        (first, second): whole(reader) / (group.num_components * groups[second].num_components)
        for first, group in enumerate(groups)
        for reader in group.readers
        if (second := writers.get(reader.module)) is not None and whole(reader)
    }


def counted_twice(pairs: Pairs, gone: Sequence[int]) -> float:
    """What components that have gone from every group have in common, and both groups' costs count."""
    return sum(price * gone[first] * gone[second] for (first, second), price in pairs.items())
