"""Removes as many components from every layer, so that the result is an ordinary, smaller model of its type."""

from collections.abc import Mapping, Sequence

from ..components.groups import Group, by_kind
from .choosing import Unit, ranked_in_runs
from .settings import PlanningSettings


def uniform_units(
    alone: Mapping[int, Sequence[Unit]], groups: Sequence[Group], settings: PlanningSettings
) -> list[Unit]:
    """Joins what goes first from every layer, what goes second, and so on; each layer chooses its own components.

    Args:
        alone (`Mapping[int, Sequence[Unit]]`): By place of a group, what can go from it, first unit first.
        groups (`Sequence[Group]`): All groups.
        settings (`PlanningSettings`): How units are ranked.

    Raises:
        ValueError: If components of a kind are parts of others, or layers have different numbers of them.
    """
    joined: list[Unit] = []
    for kind, members in by_kind(groups[place] for place in sorted(alone)).items():
        places = [place for place in sorted(alone) if groups[place].kind is kind]
        if kind.write_plain is None or len({group.num_components for group in members}) > 1:
            raise ValueError(
                f"uniform=True needs layers of one size, and no number of a config says how many {kind.name} each of "
                "them has. Prune heads and neurons of a dense model (components=['heads', 'neurons'])."
            )
        units = [
            Unit(
                {place: positions for unit in together for place, positions in unit.components.items()},
                number,
                sum(unit.score for unit in together) / len(together),
                sum(unit.harm for unit in together),
                sum(unit.saves for unit in together),
            )
            for number, together in enumerate(zip(*(alone[place] for place in places), strict=True))
        ]
        joined += ranked_in_runs(units) if settings.weigh_costs else units
    return joined
