"""What Torch-Pruning would remove: an external peer, by its released package.

    pip install torch-pruning==1.6.0

After Fang et al., *DepGraph: Towards Any Structural Pruning*, [arXiv 2301.12900](https://arxiv.org/abs/2301.12900).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hap_transformers import PruningPlan
from hap_transformers.components.groups import Group, find_groups, of_kind
from hap_transformers.efficiency import count_encoder_parameters


def torch_pruning_plan(
    model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], ratio: float
) -> PruningPlan:
    """Plans with Torch-Pruning's dependency graph and Taylor importance, ranked over all layers.

    The width of the residual stream stays, as in every other method. Heads and neurons lose the same share. That share
    is the smallest, in steps of a hundredth, that removes enough: Torch-Pruning skips layers that would lose all.

    Args:
        model (`PreTrainedModel`): A BERT-like dense classifier. Its gradients are left at `None`.
        batches (`Iterable`): Batches with labels.
        ratio (`float`): Share of the encoder's parameters to remove.

    Raises:
        ModuleNotFoundError: If Torch-Pruning is not installed.
        ValueError: If no share removes enough.
    """
    try:
        import torch_pruning  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("This method needs `pip install torch-pruning==1.6.0`.") from error
    model.eval()
    for batch in batches:
        model(**batch).loss.backward()
    example = {name: value[:1] for name, value in batch.items() if name != "labels"}
    wanted = ratio * count_encoder_parameters(model)
    try:
        for hundredths in range(round(100 * ratio), 100):
            plan = _plan(model, example, hundredths / 100)
            if plan.count_parameters(model) >= wanted:
                return plan
    finally:
        model.zero_grad(set_to_none=True)
    raise ValueError(f"Torch-Pruning removes less than {ratio:.0%} of the encoder whatever is asked of it.")


def _plan(model: PreTrainedModel, example: dict[str, torch.Tensor], share: float) -> PruningPlan:
    """The plan for one share of heads and of neurons."""
    groups = find_groups(model)
    pruner = _make_pruner(model, example, groups, share)
    features: dict[torch.nn.Module, set[int]] = {group.reader.module: set() for group in groups}
    for coupled in pruner.step(interactive=True):  # Yields what to remove, and removes nothing.
        for dependency, indices in coupled:
            module = dependency.target.module
            if module in features and pruner.DG.is_in_channel_pruning_fn(dependency.handler):
                features[module].update(indices)
    removed = {kind: _components(of_kind(groups, kind), features) for kind in ("heads", "neurons")}
    return PruningPlan.for_model(model, **removed)


def _make_pruner(model: PreTrainedModel, example: dict[str, torch.Tensor], groups: Sequence[Group], share: float):
    """Torch-Pruning's pruner, which is restricted to heads and neurons."""
    import torch_pruning

    writers = {projection.module for group in groups for projection in group.writers}
    inner = tuple(projection.module for group in of_kind(groups, "neurons") for projection in group.writers)
    heads = of_kind(groups, "heads")
    return torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        # A separate scope for neurons: else they would be ranked together with the width of heads, which stays.
        pruning_ratio_dict={inner: share},
        head_pruning_ratio=share,
        prune_num_heads=True,
        prune_head_dims=False,
        num_heads={projection.module: group.num_components for group in heads for projection in group.writers},
        # Torch-Pruning adds to these dictionaries, and its defaults are shared by all pruners.
        in_channel_groups={},
        out_channel_groups={},
        ignored_layers=[module for module in model.modules() if not list(module.children()) and module not in writers],
        output_transform=lambda outputs: outputs.logits,
    )


def _components(groups: Sequence[Group], features: Mapping[Any, set[int]]) -> dict[int, list[int]]:
    """By layer, the components that the removed input features of output projections belong to."""
    removed = {}
    for group in groups:
        size = group.reader.in_features // group.num_components
        removed[group.layer] = sorted({feature // size for feature in features[group.reader.module]})
    return {layer: components for layer, components in removed.items() if components}
