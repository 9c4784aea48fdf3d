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


# By the place of a group whose implants are smaller filters: what a rank costs less than a component, and the place of
# the group that the filters read. The cost is then for each of that group's components, or else in all.
Filters = Mapping[int, tuple[float, int | None]]


def smaller_filters(groups: Sequence[Group], whole: Callable[[Projection], float] = weights_in) -> Filters:
    """What implants of smaller filters cost less than the components that they replace.

    Args:
        groups (`Sequence[Group]`): The groups.
        whole (`Callable`, *optional*): As for [`shared_by_pairs`].
    """
    readers = {reader.module: place for place, group in enumerate(groups) for reader in group.readers}
    found: dict[int, tuple[float, int | None]] = {}
    for place, group in enumerate(groups):
        if group.implant_saves and group.num_components:
            (writer,) = group.writers
            cost, read = group.implant_saves * whole(writer) / group.num_components, readers.get(writer.module)
            inputs = 1 if read is None else groups[read].num_components
            found[place] = cost / max(inputs, 1), read
    return found


def spared(filters: Filters, ranks: Mapping[int, int], left: Sequence[int]) -> float:
    """What implants cost less than components.

    Args:
        filters (`Mapping`): What [`smaller_filters`] found.
        ranks (`Mapping[int, int]`): The rank of the implant in the group at each place.
        left (`Sequence[int]`): Components, or ranks, that every group has left.
    """
    prices = {place: cost * (1 if read is None else left[read]) for place, (cost, read) in filters.items()}
    return sum(prices.get(place, 0.0) * rank for place, rank in ranks.items())
