"""What a refit writes into."""

from ..components.groups import Group
from ..components.projections import Projection


def writers_of(group: Group) -> list[Projection]:
    """The projections that a group's block reads the residual stream by; none of an emptied block."""
    if not group.num_components:
        return []
    whole = group if group.runs is None else group.runs.whole
    return whole.writers if whole.of_stream is None else whole.of_stream


def written_into(group: Group) -> list[Projection]:
    """All projections of a group, and of the heads that it is a view of, that a refit changes."""
    norms = [] if group.norm is None else [group.norm]
    # Those of an implant's components get the statistics of what its filters give.
    return [group.reader, *writers_of(group), *norms, *(group.followers if group.implant_rank else [])]
