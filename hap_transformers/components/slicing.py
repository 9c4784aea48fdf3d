"""Cuts groups down to some of their components: rows of the projections into them, columns of those out of them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import is_pruned
from transformers import PreTrainedModel

from .groups import Group, freeze_idle_parameters
from .projections import STORED_AS, Projection, without_adapter
from .sharded import is_sharded
from .subclasses import dense_class


def validate_sliceable(model: PreTrainedModel, groups: Iterable[Group]) -> None:
    """Checks that the weights of some groups can be sliced.

    Raises:
        ValueError: If a projection is no plain Linear, Conv1D or Conv2d of floating point weights, is sharded (FSDP),
            shares its weights with another module, or has filters of two sizes.
    """
    groups = list(groups)
    validate_cuttable(model, groups)
    validate_writable(model, groups)


def validate_cuttable(model: PreTrainedModel, groups: Iterable[Group]) -> None:
    """Checks that no implant keeps the components of some groups from being removed.

    Raises:
        ValueError: If one does.
    """
    for group in groups:
        if whole := [projection.name for projection in group.projections if not projection.can_be_cut]:
            raise ValueError(
                f"Cannot score or prune {type(model).__name__} again: '{whole[0]}', by which the {group.kind.name} of "
                f"layer {group.layer} are written or read, has an implant. Prune the dense model once to the size you "
                "want, or with implant_ratio=0. Nothing was pruned."
            )


def validate_writable(model: PreTrainedModel, groups: Iterable[Group]) -> None:
    """Checks that a refit can write into the weights of some groups.

    Raises:
        ValueError: As [`validate_sliceable`] does, but for filters of two sizes.
    """
    groups = list(groups)
    validate_plain_weights(model, groups)
    users: dict[torch.Tensor, set[str]] = defaultdict(set)
    # Heads outside the base model may share a weight, too.
    inside = {module: path for path, module in model.base_model.named_modules()}
    names = {module: inside.get(module, path) for path, module in model.named_modules()}
    for module, path in names.items():
        for parameter in module.parameters(recurse=False):
            users[parameter].add(path)
    for projection in (projection for group in groups for projection in group.projections):
        module = projection.module
        if is_sharded(module):
            raise ValueError(
                f"Cannot prune {type(model).__name__}: processes have a part of '{projection.name}' each (FSDP). "
                "Prune before the model is wrapped. Nothing was pruned."
            )
        holder = model.base_model.get_submodule(projection.name)
        if not projection.is_plain or without_adapter(holder) is not holder:
            found = dense_class(holder)
            kind = f"{found.__module__}.{found.__name__}"
            kinds = ", ".join(stored.__name__ for stored in STORED_AS)
            raise ValueError(
                f"Cannot prune {type(model).__name__}: '{projection.name}' is a {kind} of dtype "
                f"{module.weight.dtype}, and only plain {kinds} layers can be sliced. Prune before "
                "quantizing or adding adapters, or merge adapters first. Nothing was pruned."
            )
        for parameter in projection.parameters:
            if others := users[parameter] - {names[module]}:
                raise ValueError(
                    f"Cannot prune {type(model).__name__}: '{projection.name}' shares a weight with "
                    f"'{min(others)}', which would no longer fit. Untie them first. Nothing was pruned."
                )


def validate_plain_weights(model: PreTrainedModel, groups: Iterable[Group]) -> None:
    """Checks that no weight of some groups is computed from others.

    Raises:
        ValueError: If a module is parametrized (`torch.nn.utils.parametrizations`, or their forerunners `weight_norm`
            and `spectral_norm`) or masked (`torch.nn.utils.prune`).
    """
    for projection in (projection for group in groups for projection in group.projections):
        module = projection.module
        of_forerunners = {"weight_g", "weight_orig"} & dict(module.named_parameters(recurse=False)).keys()
        if is_parametrized(module) or is_pruned(module) or of_forerunners:
            names = sorted(dict(module.named_parameters()).keys() - {"weight", "bias"})
            raise ValueError(
                f"Cannot score or prune {type(model).__name__}: the weights of '{projection.name}' are computed from "
                f"{', '.join(names)}. Remove the parametrization first "
                "(torch.nn.utils.parametrize.remove_parametrizations; torch.nn.utils.prune.remove for masks; "
                "torch.nn.utils.remove_weight_norm or remove_spectral_norm for the older functions)."
            )


def validate_in_memory(groups: Iterable[Group]) -> None:
    """Checks that the weights of some groups are in memory.

    Raises:
        ValueError: If they are offloaded, so that neither scoring nor slicing would reach them.
    """
    for projection in (projection for group in groups for projection in group.projections):
        if projection.module.weight.is_meta:
            raise ValueError(
                f"The weights of '{projection.name}' are not in memory but offloaded. Load the model on one device. "
                "Nothing was pruned."
            )


def keep_components(group: Group, positions: Sequence[int]) -> None:
    """Cuts a group down to the components at some positions, in place.

    Modules stay the same objects. Their parameters are replaced by smaller ones of the same dtype, device and
    `requires_grad`; only parameters without any element, which no gradient ever reaches, stop requiring gradients.

    Args:
        group (`Group`): The group, whose weights can be sliced (see [`validate_sliceable`]).
        positions (`Sequence[int]`): Positions among the present components, in the order that they shall have; kinds
            that keep their numbers need ascending order.
    """
    kept, before = torch.tensor(positions, dtype=torch.long), group.num_components
    if group.kind.split is not None and not group.is_split:
        group.kind.split(group)
    written: dict[nn.Module, list[Projection]] = defaultdict(list)
    for projection in (*group.writers, *group.followers):
        written[projection.module].append(projection)
    rows = [(parts[0], *_rows_left(parts, kept, before)) for parts in written.values()]
    columns = [(reader, reader.positions(_runs(kept, reader.in_features // before))) for reader in group.readers]
    for projection, index, sizes in rows:
        projection.keep(index, outputs=True)
        if projection.parts > 1:
            vars(projection.module)["part_sizes"] = sizes
    for reader, run in columns:
        reader.keep(run, outputs=False)
    if group.runs is not None:
        group.runs.keep(positions)
    for projection in group.projections:
        vars(projection.module)["was_cut"] = True  # Goes with the module where it is put into another model.
    if group.implant_rank and group.kind.implant is not None:
        first = before - group.implant_rank  # The first of the linear components, which are the last.
        group.kind.implant(group, sum(position >= first for position in positions))
    group.kept = [group.kept[position] for position in positions] if group.kind.keeps_numbers else range(len(kept))
    group.kind.fit(group)
    freeze_idle_parameters([group])


def was_cut(module: nn.Module) -> bool:
    """Whether a module has lost components."""
    return "was_cut" in vars(module)


def _rows_left(parts: Sequence[Projection], kept: torch.Tensor, before: int) -> tuple[torch.Tensor, list[int]]:
    """Outputs of a module that stay, over all its parts, and how many of each part; others than `parts` stay whole."""
    sizes = parts[0].part_sizes
    by_part = {projection.part: projection for projection in parts}
    index, left = [], []
    for part, size in enumerate(sizes):
        stay = torch.arange(size)
        if part in by_part:
            stay = by_part[part].positions(_runs(kept, size // before))
        index.append(stay + sum(sizes[:part]))
        left.append(len(stay))
    return torch.cat(index), left


def _runs(kept: torch.Tensor, length: int) -> torch.Tensor:
    """Indices of the features of the kept components, of which each has `length`."""
    return (kept[:, None] * length + torch.arange(length)).flatten()
