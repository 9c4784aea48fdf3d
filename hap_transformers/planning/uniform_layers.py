"""Removes as many components from every layer, so that the result is an ordinary, smaller model of its type."""

from collections.abc import Mapping, Sequence

from transformers import PretrainedConfig, PreTrainedModel

from ..components.groups import Group, by_kind, find_groups
from ..components.plain_config import config_can_say, places_alike, validate_plain
from .choosing import Unit, ranked_in_runs
from .settings import PlanningSettings


def validate_uniform(model: PreTrainedModel, kinds: Sequence[str]) -> None:
    """Checks that plain numbers of a model's config can say that all layers have fewer components of some kinds.

    Raises:
        ValueError: If they cannot.
    """
    groups = find_groups(model, kinds)
    for kind, members in by_kind(groups).items():
        if kind.made_of:
            _validate_shallower(model, members)
            continue
        dense = members[0].num_components
        for count in (dense // 2, dense // 4, dense - 1):  # Some numbers do not fit others in the config.
            left = [count if group.kind is kind else group.num_components for group in groups]
            try:
                validate_plain(model, groups, left)
                break
            except ValueError as error:
                refused = error
        else:
            raise refused


def _validate_shallower(model: PreTrainedModel, layers: Sequence[Group]) -> None:
    """Checks that some layer can be left out; others may be of use by their place."""
    groups = find_groups(model)
    for layer in layers[::-1]:
        left = [0 if group.block == layer.layer else group.num_components for group in groups]
        try:
            return validate_plain(model, groups, left)
        except ValueError as error:
            refused = error
    raise refused


def uniform_units(
    alone: Mapping[int, Sequence[Unit]], groups: Sequence[Group], settings: PlanningSettings, config: PretrainedConfig
) -> list[Unit]:
    """Joins what goes first from every layer, what goes second, and so on; each layer chooses its own components.

    Args:
        alone (`Mapping[int, Sequence[Unit]]`): By place of a group, what can go from it, first unit first.
        groups (`Sequence[Group]`): All groups.
        settings (`PlanningSettings`): How units are ranked.
        config (`PretrainedConfig`): The model's config. What it cannot say a number of, goes with what goes next.

    Raises:
        ValueError: If components of a kind are parts of others, or layers have different numbers of them.
    """
    joined: list[Unit] = []
    alone = {place: units for place, units in alone.items() if groups[place].num_components}
    for kind, of_kind in by_kind(groups[place] for place in sorted(alone)).items():
        places_of_kind = [place for place in sorted(alone) if groups[place].kind is kind]
        for alike in places_alike(of_kind):
            members, places = [of_kind[i] for i in alike], [places_of_kind[i] for i in alike]
            if kind.write_plain is None or len({group.num_components for group in members}) > 1:
                raise ValueError(
                    f"uniform=True needs layers that have equally many {kind.name}, and a number in the config that "
                    "says how many. Prune heads and neurons of a dense model (components=['heads', 'neurons']), or "
                    "set uniform=False."
                )
            units, waiting, left = list[Unit](), list[Unit](), members[0].num_components
            for together in zip(*(alone[place] for place in places), strict=True):
                waiting += together
                left -= len(together[0].components[places[0]])
                if config_can_say(config, members, [left] * len(members)):
                    units.append(_joined(waiting, len(units)))
                    waiting = []
            joined += ranked_in_runs(units) if settings.weigh_costs else units
    return joined


def _joined(units: Sequence[Unit], number: int) -> Unit:
    """Units that go together."""
    components: dict[int, list[int]] = {}
    for unit in units:
        for place, positions in unit.components.items():
            components.setdefault(place, []).extend(positions)
    score = sum(unit.score for unit in units) / len(units)
    return Unit(components, number, score, sum(unit.harm for unit in units), sum(unit.saves for unit in units))
