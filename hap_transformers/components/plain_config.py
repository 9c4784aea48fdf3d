"""Configs of models whose layers all have one size: plain numbers, as a dense model of that size has."""

import copy
from collections.abc import Collection, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .depth import emptied_layers, layers_left_out, layers_to_leave_out, plain_facts, why_layers_stay, write_depth
from .groups import KINDS, Group, Kind, by_kind, find_groups
from .record import UNIFORM, recorded_structure


def saved_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config that a checkpoint of a model gets: its own, or plain numbers where a uniform plan was applied."""
    if not (recorded_structure(model.config) or {}).get(UNIFORM):
        return model.config
    groups = find_groups(model)
    gone = layers_to_leave_out(model)
    left = [group for group in groups if group.block not in gone]
    return _plain_config(model.config, left, [group.num_components for group in left], gone)


def validate_plain(model: PreTrainedModel, groups: Sequence[Group], left: Sequence[int]) -> None:
    """Checks that a config of a model's type can say by plain numbers what all layers shall have.

    Args:
        model (`PreTrainedModel`): The model; it is only read.
        groups (`Sequence[Group]`): All its groups.
        left (`Sequence[int]`): How many components each of them shall have.

    Raises:
        ValueError: If layers differ, a kind has no such number, or a model that is made of the config has other sizes;
            where layers are emptied, if they still do something, or the others would do something else.
    """
    gone = emptied_layers(groups, left)
    if gone and (reason := why_layers_stay(model, groups)):
        raise ValueError(
            f"A uniform plan leaves layers {sorted(gone)} of this {type(model).__name__} out, but {reason}. Set "
            "uniform=False: emptied layers then stay, and compute no matrix product."
        )
    staying = [(group, count) for group, count in zip(groups, left, strict=True) if group.block not in gone]
    numbers: dict[tuple[Kind, str], int] = {}
    for kind, members in by_kind(group for group, _ in staying).items():
        counts = [count for group, count in staying if group.kind is kind]
        if kind.write_plain is None and counts == [group.original for group in members]:
            continue
        implanted = any(group.implant_rank for group in members)
        alike = places_alike(members)
        differ = any(len({counts[place] for place in places}) > 1 for places in alike)
        if kind.write_plain is None or implanted or differ or not all(counts):
            sizes = [group.num_components for group in members]
            own = differ and any(len({sizes[place] for place in places}) > 1 for places in alike)
            remedy = f"The layers have {sizes} now, so set" if own else "Plan again with uniform=True, or set"
            raise ValueError(
                f"A uniform plan leaves every layer as many whole components, at least one, and no implants. This one "
                f"leaves {counts} {kind.name}. {remedy} uniform=False."
            )
        numbers |= {(kind, members[places[0]].plain): counts[places[0]] for places in alike}
    left = [numbers.get((group.kind, group.plain), group.num_components) for group in groups]
    made = _made(model, groups, left)
    found = [] if made is None else find_groups(made, _names(groups))
    fits = len(found) == len(groups) and all(map(_is_made, found, groups, left))
    if made is None or not fits or _shapes_around(made, found) != _shapes_around(model, groups):
        raise ValueError(
            f"The config of a '{model.config.model_type}' has no numbers for such layers alone: the size of heads "
            "follows from their number, their number must divide the hidden size, or position biases have one a "
            "head. Set uniform=False, or prune another kind (components=['neurons'])."
        )
    if gone:
        _validate_depth(model, groups, left, gone, made)


def places_alike(groups: Sequence[Group]) -> list[list[int]]:
    """Places of the groups of a kind that a config gives one number for; a decoder may have another."""
    found: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(group.plain, []).append(place)
    return list(found.values())


def _validate_depth(
    model: PreTrainedModel, groups: Sequence[Group], left: Sequence[int], gone: Collection[int], made: PreTrainedModel
) -> None:
    """Checks that a checkpoint without some layers gives the same model.

    Args:
        model (`PreTrainedModel`): The model.
        groups (`Sequence[Group]`): Its groups.
        left (`Sequence[int]`): The components that those of the other layers shall have.
        gone (`Collection[int]`): The layers.
        made (`PreTrainedModel`): A model of all layers, of these sizes; it loses the layers.

    Raises:
        ValueError: If it does not.
    """
    fewer = _made(model, groups, left, gone)
    with layers_left_out(made, gone):
        if fewer is None or plain_facts(fewer) != plain_facts(made):
            raise ValueError(
                f"A {type(model).__name__} whose layers {sorted(gone)} are left out has others where these were, "
                "which depend on their places. Set uniform=False: emptied layers then stay, and compute no matrix "
                "product."
            )


def _made(
    model: PreTrainedModel, groups: Sequence[Group], left: Sequence[int], gone: Collection[int] = ()
) -> PreTrainedModel | None:
    """A model that is made of a plain config, without memory for its weights; `None` if there is none."""
    if not config_can_say(model.config, groups, left, gone):
        return None
    try:
        with torch.device("meta"):
            made = type(model)(_plain_config(model.config, groups, left, gone))
        find_groups(made, _names(groups))
        return made
    except (TypeError, ValueError):  # Raised by configs whose numbers do not belong together, or are several.
        return None


def _is_made(made: Group, group: Group, count: int) -> bool:
    """Whether a group of a model that was made of a config is what so many components of another model's are."""
    if (made.kind, made.num_components, made.head_size) != (group.kind, count, group.head_size):
        return False
    # ELECTRA takes numbers of heads that do not divide the hidden size, and makes heads of another size than asked.
    features = [
        [*(writer.out_features for writer in each.writers), *(reader.in_features for reader in each.readers)]
        for each in (made, group)
    ]
    share = group.num_components
    return not share or [own * share for own in features[0]] == [whole * count for whole in features[1]]


def _names(groups: Sequence[Group]) -> set[str]:
    return {group.kind.name for group in groups}


def config_can_say(
    config: PretrainedConfig, groups: Sequence[Group], left: Sequence[int], gone: Collection[int] = ()
) -> bool:
    """Whether a config takes the numbers of so many components of some groups, with which it is saved and loaded.

    Transformers 5 checks the configs of some types, in which the number of heads must divide the hidden size.
    """
    try:
        plain = _plain_config(config, groups, left, gone)
        type(config).from_dict(plain.to_dict())
    except Exception:  # Each check has an error of its own.
        return False
    return True


def _shapes_around(model: PreTrainedModel, groups: Sequence[Group]) -> dict[str, torch.Size]:
    """Shapes of the parameters that no component owns."""
    owned = {id(parameter) for group in groups for view in group.projections for parameter in view.parameters}
    return {name: parameter.shape for name, parameter in model.named_parameters() if id(parameter) not in owned}


def _plain_config(
    config: PretrainedConfig, groups: Sequence[Group], left: Sequence[int], gone: Collection[int] = ()
) -> PretrainedConfig:
    """A config with the numbers of components of all groups, without those layers that are gone."""
    plain = copy.deepcopy(config)
    if recorded_structure(plain) is not None:
        del plain.quantization_config
    for name in (f"pruned_{kind.name}" for kind in KINDS.values() if kind.keeps_numbers):
        if getattr(plain, name, None):
            setattr(plain, name, {})  # Components are numbered anew.
    for group, count in zip(groups, left, strict=True):
        whole = group.kind.keeps_numbers and count == group.original  # The config says so already.
        if group.kind.write_plain is not None and not whole:
            group.kind.write_plain(plain, group, count)
    if gone:
        write_depth(plain, gone)
    return plain
