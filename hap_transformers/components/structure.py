"""The structure of a pruned model as its config records it, and a dense model cut down to a record."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from .architectures import ARCHITECTURES
from .groups import KINDS, Group, Kind, by_kind, find_groups, kinds_in_use
from .record import METHOD, UNIFORM, recorded_structure
from .runs import marks_of
from .slicing import keep_components, validate_sliceable, was_cut


def record_structure(
    model: PreTrainedModel, groups: Sequence[Group], changed: Sequence[Group], uniform: bool = False
) -> None:
    """Writes what is left into the config.

    `config.quantization_config` records how many components of each kind pruned layers have, by the layer's number,
    and how many of them are linear, or which have 1x1 filters. It has that name because Transformers lets nothing else
    change a model between its construction and the loading of its weights. For kinds that keep their numbers,
    `config.pruned_NAME` records which components are gone, as `config.pruned_heads` does in Transformers 4.

    Args:
        model (`PreTrainedModel`): The model.
        groups (`Sequence[Group]`): All its groups.
        changed (`Sequence[Group]`): Those that have just lost components.
        uniform (`bool`, *optional*, defaults to `False`): Whether all layers have one size, which a checkpoint says by
            plain numbers ([`saved_config`][hap_transformers.checkpoints.plain_config.saved_config]).
    """
    recorded = recorded_structure(model.config) or {}
    counts: dict[str, dict[str, Any]] = {}
    for kind, members in by_kind(groups).items():
        if kind.keeps_numbers:
            fewer = [group for group in members if group.num_components < group.original]
            setattr(model.config, f"pruned_{kind.name}", {group.layer: numbers_gone(group) for group in fewer})
            cut = [group for group in members if group in fewer or group.implant_rank]
            counts[kind.name] = {str(group.layer): group.num_components for group in cut}
        elif kind.outside:
            counts[kind.name] = {str(group.layer): group.num_components for group in members if group.is_split}
        elif kind.instead_of:
            counts[kind.name] = {str(group.layer): _left(group) for group in members}
            setattr(model.config, f"pruned_{kind.instead_of}", {})  # Those that were gone before have nothing left.
        else:
            fewer = [group for group in changed if group.kind == kind]
            now = {str(group.layer): group.num_components for group in fewer}
            counts[kind.name] = {**(recorded.get(kind.name) or {}), **now}
    implants = {str(group.layer): _implant_of(group) for group in groups if group.implant_rank}
    if changed or recorded:
        structure: dict[str, Any] = {"quant_method": METHOD, **counts, **({"implants": implants} if implants else {})}
        structure |= {UNIFORM: True} if uniform else {}
        model.config.quantization_config = structure


def join_whole(model: PreTrainedModel) -> None:
    """Joins groups that were split and have lost nothing, in place, so that they are as in the dense model."""
    if whole := [group for group in find_groups(model) if group.is_split and group.num_components == group.whole]:
        for group in whole:
            assert group.kind.join is not None  # Those that are split can be joined.
            group.kind.join(group)
        record_structure(model, find_groups(model, kinds_in_use(model, {group.kind.name for group in whole})), [])
        if not any(recorded for name, recorded in model.config.quantization_config.items() if name != "quant_method"):
            del model.config.quantization_config


def validate_record(model: PreTrainedModel, groups: Iterable[Group]) -> None:
    """Checks that a model's config describes this model, before more is removed and written into it.

    Raises:
        ValueError: If it describes another one: a config was shared between models, or taken from a pruned one.
    """
    recorded = recorded_structure(model.config) or {}
    for group in groups:
        if group.kind.keeps_numbers:
            gone = recorded_numbers(model.config, group.kind).get(str(group.layer), ())
            fits = set(gone) == set(numbers_gone(group))
        else:
            fits = _recorded_left(group, recorded.get(group.kind.name) or {}) == _left(group)
        if not fits:
            raise ValueError(
                f"The config of this {type(model).__name__} records a different pruning of layer {group.layer} than "
                "its weights show. Load a pruned model by from_pretrained, and give each new one its own "
                "copy.deepcopy(config), made before any pruning. Nothing was changed."
            )


def validate_savable(model: PreTrainedModel) -> None:
    """Checks that a pruned model's config describes the whole model, so that its checkpoint can be loaded.

    Raises:
        ValueError: If a part of the model was pruned apart from it, or layers were dropped after pruning.
    """
    parts = {path: part for path, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    pruned = [path for path, part in parts.items() if recorded_structure(part.config) is not None]
    pruned += [path for path, module in model.named_modules() if was_cut(module)]
    if not pruned:
        return
    recorded, known = recorded_structure(model.config), model.config.model_type in ARCHITECTURES
    remedy = "its checkpoint could not be loaded."
    if recorded is None:
        ways = (
            "Give both the same config before pruning, or load the pruned one as the whole model."
            if known
            else "Save that part by its own save_pretrained, and put it in again after loading."
        )
        raise ValueError(
            f"'{pruned[0]}' of this {type(model).__name__} was pruned, but the config of the whole model does not "
            f"record it: {remedy} {ways}"
        )
    if not known:
        return
    groups = find_groups(model)
    layers = {str(group.layer) for group in groups}
    beyond = {layer for kind in KINDS for layer in recorded.get(kind) or {}} - layers
    if beyond:
        raise ValueError(
            f"The config of this {type(model).__name__} records layers {sorted(beyond)}, which the model does not "
            f"have: {remedy} Drop layers before pruning."
        )
    validate_record(model, groups)
    recording = [group for group in groups if str(group.layer) in (recorded.get(group.kind.name) or {})]
    cut_by_them = {projection.module for group in recording for projection in group.projections}
    for group in groups:
        if any(was_cut(p.module) and p.module not in cut_by_them for p in group.projections):
            raise ValueError(
                f"The {group.kind.name} of layer {group.layer} of this {type(model).__name__} were pruned in another "
                f"model, and its config does not record it: {remedy} Swap modules before pruning."
            )


def _implant_of(group: Group) -> int | list[int]:
    """What is recorded of an implant: its rank, or the numbers of its components where these keep them."""
    return list(group.kept[-group.implant_rank :]) if group.kind.keeps_numbers else group.implant_rank


def _left(group: Group) -> "Left":
    """What is recorded of a group as it is."""
    if group.runs is None:
        return group.num_components
    return list(group.runs.left if group.runs.marks is None else group.runs.marks)


def _recorded_left(group: Group, recorded: Mapping[str, Any]) -> Any:
    """What is recorded of a group, or what it has, if nothing is."""
    left = recorded.get(str(group.layer), _left(group))
    if group.runs is None or group.runs.marks is None or not isinstance(left, list):
        return left
    # Before rotary pairs went one by one, heads had 0 or 1 for all of them.
    return [marks_of(own, len(group.runs.marks[0])) if type(own) is int and own in (0, 1) else own for own in left]


def numbers_gone(group: Group) -> list[int]:
    """Numbers of the components that a group has lost."""
    return sorted(set(range(group.original)) - set(group.kept))


def recorded_numbers(config: PretrainedConfig, kind: Kind) -> dict[str, list[int]]:
    """For each layer, the numbers of the components that `config.pruned_NAME` records as gone."""
    recorded = getattr(config, f"pruned_{kind.name}", None) or {}
    return {str(layer): numbers for layer, numbers in recorded.items()}


# What is recorded of a group: its number of components, or for each part their number or marks.
Left = int | list[Any]


def number_left(left: Left) -> int:
    """How many components a record leaves a group."""
    if isinstance(left, int):
        return left
    return sum(own.count("1") if isinstance(own, str) else own for own in left)


def recorded_counts(model: PreTrainedModel, structure: Mapping[str, Any]) -> list[tuple[Group, Left]]:
    """Pairs every group of a model with the components that it shall have: their number, or that or marks by parts.

    Args:
        model (`PreTrainedModel`): The model as built from its config, dense or rebuilt already.
        structure (`Mapping[str, Any]`): What [`record_structure`] wrote.

    Raises:
        ValueError: If the record names a kind or layer that does not exist, gives it a number of components that is
            not a whole number between zero and the dense model's, marks others than the dense model's, or contradicts
            `config.pruned_NAME`.
    """
    unknown = structure.keys() - {"quant_method", "implants", UNIFORM, *KINDS}
    if unknown:
        raise ValueError(
            f"The structure in the checkpoint's config has {sorted(unknown)}, which this release of hap_transformers "
            "does not know. Upgrade the package, or register the kinds it names."
        )
    found = by_kind(find_groups(model, kinds_in_use(model, (name for name in structure if structure[name]))))
    _validate_one_view(model, structure, found)
    if absent := {name for name in KINDS if structure.get(name)} - {kind.name for kind in found}:
        raise ValueError(
            f"The checkpoint's config records {', '.join(sorted(absent))}, but {type(model).__name__} has components "
            f"of the kinds {', '.join(kind.name for kind in found)} only."
        )
    for kind, groups in found.items():
        if kind.keeps_numbers:
            _validate_numbers(model, kind, groups)
    counts = [pair for kind, groups in found.items() for pair in _counts_of_kind(model, structure, kind, groups)]
    _recorded_implants(counts, structure)
    return counts


def _validate_one_view(model: PreTrainedModel, structure: Mapping[str, Any], found: Iterable[Kind]) -> None:
    """Checks that nothing is recorded of a kind of which a finer view is recorded, too."""
    for whole in {kind.instead_of for kind in found} - {None}:
        if structure.get(str(whole)) or getattr(model.config, f"pruned_{whole}", None):
            parts = " and ".join(kind.name for kind in found if kind.instead_of == whole)
            raise ValueError(
                f"The checkpoint's config records both {whole} and {parts}, which are parts of them. Remove its "
                f"{whole} and pruned_{whole}: {whole} that are gone have the number 0 among the {parts}."
            )


def rebuild_structure(model: PreTrainedModel, structure: Mapping[str, Any]) -> None:
    """Cuts a model, dense or rebuilt already, down to a recorded structure; its weights are yet to be loaded.

    Raises:
        ValueError: As [`recorded_counts`] does, before anything is changed.
    """
    counts = recorded_counts(model, structure)
    implants = _recorded_implants(counts, structure)
    last = {group.layer: numbers for group, numbers in implants if isinstance(numbers, list)}
    positions = [(group, _positions_left(model, group, left, last.get(group.layer, ()))) for group, left in counts]
    cut = [
        (group, kept)
        for group, kept in positions
        if _is_to_split(group) or list(kept) != list(range(group.num_components))
    ]
    validate_sliceable(model, [group for group, _ in cut])
    for group, kept in cut:
        keep_components(group, kept)
    for group, recorded in implants:
        rank = recorded if isinstance(recorded, int) else len(recorded)
        assert group.kind.implant is not None  # Only such groups are paired with one.
        if group.implant_rank != rank:
            group.kind.implant(group, rank)


def _is_to_split(group: Group) -> bool:
    """Whether a group, whose kind is recorded, has yet to be split."""
    return group.whole is not None and not group.is_split


def _counts_of_kind(
    model: PreTrainedModel, structure: Mapping[str, Any], kind: Kind, groups: Sequence[Group]
) -> list[tuple[Group, Left]]:
    recorded = structure.get(kind.name) or {}
    if not isinstance(recorded, Mapping) or recorded.keys() - {str(group.layer) for group in groups}:
        raise ValueError(
            f"The checkpoint's config gives numbers of {kind.name} by layer as {recorded!r:.200}; "
            f"{type(model).__name__} has layers 0 to {len(groups) - 1}."
        )
    counts = [(group, _recorded_left(group, recorded)) for group in groups]
    for group, left in counts:
        if group.runs is None:
            _validate_count(model, group, left)
        else:
            _validate_parts(group, left)
    return counts


def _validate_count(model: PreTrainedModel, group: Group, count: Any) -> None:
    if type(count) is not int or not 0 <= count <= group.num_components:
        raise ValueError(
            f"The checkpoint's config gives layer {group.layer} {count!r:.200} {group.kind.name}; expected a whole "
            f"number from 0 to {group.num_components}."
        )
    if group.kind.keeps_numbers and (left := len(_positions_left(model, group, count))) != count:
        raise ValueError(
            f"The checkpoint's config gives layer {group.layer} {count} {group.kind.name}, but its "
            f"pruned_{group.kind.name} leaves it {left} of {group.original}."
        )


def _validate_parts(group: Group, left: Any) -> None:
    assert group.runs is not None
    if group.runs.marks is None:
        _validate_counts_of_parts(group, left, group.runs.left)
    else:
        _validate_marks_of_parts(group, left, group.runs.marks)


def _validate_marks_of_parts(group: Group, marks: Any, present: Sequence[str]) -> None:
    fits = isinstance(marks, list) and len(marks) == len(present) and all(isinstance(own, str) for own in marks)
    # What is gone stays gone.
    allowed = [most.replace("1", "[01]") for most in present]
    if not fits or not all(re.fullmatch(pattern, own) for pattern, own in zip(allowed, marks, strict=True)):
        raise ValueError(
            f"The checkpoint's config gives layer {group.layer} {marks!r:.200} {group.kind.name}; expected a list of "
            f"{len(present)} texts, one for each of its {group.kind.instead_of}, with {len(present[0])} marks each: 1 "
            "for a rotary pair that is left, 0 for one that is gone."
        )


def _validate_counts_of_parts(group: Group, counts: Any, present: Sequence[int]) -> None:
    fits = isinstance(counts, list) and len(counts) == len(present) and all(type(count) is int for count in counts)
    if not fits or any(not 0 <= count <= most for count, most in zip(counts, present, strict=True)):
        raise ValueError(
            f"The checkpoint's config gives layer {group.layer} {counts!r:.200} {group.kind.name}; expected a list of "
            f"{len(present)} whole numbers, one for each of its {group.kind.instead_of}, up to {max(present)}."
        )


def _recorded_implants(
    counts: Sequence[tuple[Group, Left]], structure: Mapping[str, Any]
) -> list[tuple[Group, int | list[int]]]:
    """Every group that has an implant, with its rank, or the numbers of its components where these keep them."""
    able = {str(group.layer): (group, left) for group, left in counts if group.kind.implant is not None}
    recorded = structure.get("implants") or {}
    if not isinstance(recorded, Mapping):
        raise ValueError(f"The checkpoint's config gives implants by layer as {recorded!r:.200}.")
    for layer, found in recorded.items():
        group, left = able.get(layer, (None, 0))
        if group is not None and not group.kind.keeps_numbers:
            left = (structure.get(group.kind.name) or {}).get(layer, 0)
        if group is None or group.implantable is None or not _is_implant(group, number_left(left), found):
            raise ValueError(
                f"The checkpoint's config gives layer {layer!r:.20} an implant of rank {found!r:.200}; expected a "
                f"whole number from 1 to its {left} components, or of channels their ascending numbers, in one of "
                f"layers 0 to {len(able) - 1} that can have an implant."
            )
    return [(able[layer][0], found) for layer, found in recorded.items()]


def filters_apart(group: Group, structure: Mapping[str, Any]) -> int:
    """How many of a group's components are recorded to have smaller filters, which are stored by themselves."""
    takes_them = group.kind.implant is not None and not group.kind.linear_implants
    return len((structure.get("implants") or {}).get(str(group.layer), ())) if takes_them else 0


def _is_implant(group: Group, left: int, recorded: Any) -> bool:
    """Whether what is recorded can be the implant of a group that has so many components left."""
    if not group.kind.keeps_numbers:
        return type(recorded) is int and 0 < recorded <= left
    whole = isinstance(recorded, list) and all(type(number) is int for number in recorded)
    return whole and 0 < len(recorded) <= left and sorted(set(recorded) & set(group.kept)) == recorded


def _validate_numbers(model: PreTrainedModel, kind: Kind, groups: Sequence[Group]) -> None:
    by_layer = {str(group.layer): group for group in groups}
    recorded = getattr(model.config, f"pruned_{kind.name}", None) or {}
    for layer, numbers in recorded.items() if isinstance(recorded, Mapping) else [("", recorded)]:
        total = by_layer[str(layer)].original if str(layer) in by_layer else 0
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < total for n in numbers):
            raise ValueError(
                f"The pruned_{kind.name} of the checkpoint's config are {recorded!r:.200}; expected {kind.name} of "
                f"layers 0 to {len(groups) - 1}."
            )


def _positions_left(model: PreTrainedModel, group: Group, left: Left, implanted: Sequence[int] = ()) -> Sequence[int]:
    """Positions in a dense group of the components that the config leaves; those of an implant are the last."""
    if group.kind.keeps_numbers:
        gone = recorded_numbers(model.config, group.kind).get(str(group.layer), ())
        stay = [position for position, number in enumerate(group.kept) if number not in gone]
        return sorted(stay, key=lambda position: (group.kept[position] in implanted, position))
    if isinstance(left, int):
        return range(left)
    assert group.runs is not None  # Only such groups have numbers of parts.
    if group.runs.marks is not None:
        present, marks = "".join(group.runs.marks), "".join(left)
        there = [place for place, mark in enumerate(present) if mark == "1"]
        return [position for position, place in enumerate(there) if marks[place] == "1"]
    starts = accumulate([0, *group.runs.left])
    return [start + i for start, count in zip(starts, left, strict=False) for i in range(count)]
