"""Physically removes heads, neurons and other components from a model."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ..components.forwards import eager_model
from ..components.groups import Group, find_groups, of_kind
from ..components.slicing import keep_components, validate_in_memory, validate_sliceable
from ..components.structure import join_whole, record_structure, validate_record
from .component_numbers import validate_numbers
from .implants import insert_implant, validate_implantable
from .plan import PruningPlan


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Removes what a plan names from a model, in place.

    Modules stay the same objects (hooks survive). Their parameters are replaced by smaller ones of the same dtype,
    device and `requires_grad`: drop any optimizer made before. A block may lose all its components. An emptied block
    only adds its output bias; no matrix product is computed. Implants start from zero: they add nothing until they are
    trained, or initialised by [`reconstruct`]. The new structure is written into `model.config`, so that
    `save_pretrained` makes a checkpoint which `from_pretrained` rebuilds.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture, pruned before or not.
        plan (`PruningPlan`): What to remove.

    Raises:
        ValueError: If the plan does not fit the model as it is now, or a weight cannot be sliced because it is
            quantized, wrapped by an adapter or shared with another module, or has an implant of 1x1 filters; the model
            is then untouched.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8)
        >>> model = BertModel(config)
        >>> apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={0: [2, 3, 5]}))
        >>> model.encoder.layer[0].output.dense
        Linear(in_features=5, out_features=8, bias=True)
    """
    model = eager_model(model)
    groups = plan.groups_of(model)
    plan.validate(model, groups)
    _remove(model, groups, plan)


def prune_heads(model: PreTrainedModel, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
    """Removes attention heads from a model, in place, as [`apply_plan`] does.

    The contract is that of `PreTrainedModel.prune_heads` in Transformers 4: heads are numbered as in the original
    model, heads already gone are skipped, `config.pruned_heads` accumulates. With grouped-query attention, the heads
    are key/value heads, each with its query heads. Of encoder-decoders, a decoder's layers and its cross-attention are
    numbered as [`find_groups`][hap_transformers.components.groups.find_groups] says.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture.
        heads_to_prune (`Mapping[int, Sequence[int]]`): Layer number to the heads to remove there.

    Raises:
        ValueError: If the architecture is unknown, a layer or head does not exist, or a weight cannot be sliced; the
            model is then untouched.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8)
        >>> model = BertModel(config)
        >>> prune_heads(model, {0: [1, 3]})
        >>> model.encoder.layer[0].attention.self.query.weight.shape
        torch.Size([4, 8])
    """
    model = eager_model(model)
    groups = find_groups(model)
    whole = of_kind(groups, "heads")
    if not whole:
        raise ValueError(
            f"The heads of this {type(model).__name__} have lost dimensions; remove value and query/key dimensions "
            "instead (PruningPlan.for_model). Nothing was pruned."
        )
    heads = validate_numbers(whole, heads_to_prune)
    _remove(model, groups, PruningPlan({"heads": heads}, model.config.model_type))


# Parameters that are made in inference mode could never be trained.
@torch.inference_mode(False)
def _remove(model: PreTrainedModel, groups: Sequence[Group], plan: PruningPlan) -> None:
    """Removes components that are known to exist, and puts implants in."""
    ranks = [plan.rank_for(group) for group in groups]
    left = [
        _positions_left(group, plan.of_group(group), plan.implanted_in(group) or rank)
        for group, rank in zip(groups, ranks, strict=True)
    ]
    kept = [
        (group, positions, rank)
        for group, positions, rank in zip(groups, left, ranks, strict=True)
        if len(positions) < group.num_components or rank
    ]
    changed = [group for group, _, _ in kept]
    validate_record(model, groups)
    validate_sliceable(model, changed)
    validate_in_memory(changed)
    validate_implantable(model, (group for group, _, rank in kept if rank))
    for group, positions, _ in kept:
        keep_components(group, positions)
    for group, _, rank in kept:
        if rank:
            insert_implant(group, rank)
    record_structure(model, groups, changed, plan.uniform)
    join_whole(model)


def _positions_left(group: Group, gone: Sequence[int], implant: int | Sequence[int]) -> list[int]:
    """Positions of the components that stay; those in whose place an implant comes stay for now, as the last.

    Args:
        group (`Group`): The group.
        gone (`Sequence[int]`): Numbers of the components that go.
        implant (`int` or `Sequence[int]`): Rank of the implant, or numbers of the components that it replaces.
    """
    removed = set(gone)
    left = [position for position, number in enumerate(group.kept) if number not in removed]
    replaced = [position for position, number in enumerate(group.kept) if number in removed]
    if isinstance(implant, int):
        return left + replaced[:implant]
    return left + [position for position in replaced if group.kept[position] in implant]
