"""What Torch-Pruning would remove: an external peer, by its released package.

    pip install torch-pruning==1.6.0

After Fang et al., *DepGraph: Towards Any Structural Pruning*, [arXiv 2301.12900](https://arxiv.org/abs/2301.12900).
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hap_transformers import PruningPlan
from hap_transformers.components.groups import Group, by_kind, find_groups, of_kind
from hap_transformers.efficiency import count_encoder_parameters


Gradients = dict[torch.nn.Parameter, torch.Tensor]


def torch_pruning_plan(
    model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], ratio: float
) -> PruningPlan:
    """Plans with Torch-Pruning's dependency graph and Taylor importance, ranked over all layers.

    The width of the residual stream stays, as in every other method. Heads and neurons lose the same share.

    Args:
        model (`PreTrainedModel`): A BERT-like dense classifier. Its gradients are left at `None`.
        batches (`Iterable`): Batches with labels.
        ratio (`float`): Share of the encoder's parameters to remove.

    Raises:
        ModuleNotFoundError: If Torch-Pruning is not installed.
        ValueError: If no share removes enough.
    """
    batches = list(batches)
    example = {name: value[:1] for name, value in batches[-1].items() if name != "labels"}
    return plan_by_gradients(model, loss_gradients(model, batches), example, ratio)


def loss_gradients(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> Gradients:
    """Adds up the gradients of a model's loss over batches. Those of the parameters are left at `None`."""
    model.eval()
    for batch in batches:
        model(**batch).loss.backward()
    found = {parameter: parameter.grad for parameter in model.parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def plan_by_gradients(
    model: PreTrainedModel, gradients: Gradients, example: dict[str, torch.Tensor], ratio: float, steps: int = 100
) -> PruningPlan:
    """Plans as [`torch_pruning_plan`] does, by gradients that are there.

    The share that Torch-Pruning is asked for is the smallest that removes enough: it skips layers that would lose all.

    Args:
        model (`PreTrainedModel`): The dense classifier.
        gradients (`dict`): What [`loss_gradients`] returned for it.
        example (`dict[str, torch.Tensor]`): Inputs of one example, without labels.
        ratio (`float`): Share of the encoder's parameters to remove.
        steps (`int`, *optional*, defaults to 100): Shares are multiples of one over this.

    Raises:
        ModuleNotFoundError: If Torch-Pruning is not installed.
        ValueError: If no share removes enough.
    """
    try:
        import torch_pruning  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("This method needs `pip install torch-pruning==1.6.0`.") from error
    wanted, plans = ratio * count_encoder_parameters(model), {}
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    try:
        # More goes with a larger share, up to where layers would lose all.
        def removed(step: int) -> int:
            plans[step] = _plan(model, example, step / steps)
            return plans[step].count_parameters(model)

        found = bisect_left(range(steps), wanted, key=removed)
    finally:
        model.zero_grad(set_to_none=True)
    if found == steps:
        raise ValueError(f"Torch-Pruning removes less than {ratio:.0%} of the encoder whatever is asked of it.")
    return plans[found]


def _plan(model: PreTrainedModel, example: dict[str, torch.Tensor], share: float) -> PruningPlan:
    """The plan for one share of each kind of component."""
    groups = find_groups(model)
    pruner = _make_pruner(model, example, groups, share)
    features: dict[torch.nn.Module, set[int]] = {group.reader.module: set() for group in groups}
    for coupled in pruner.step(interactive=True):  # Yields what to remove, and removes nothing.
        for dependency, indices in coupled:
            module = dependency.target.module
            if module in features and pruner.DG.is_in_channel_pruning_fn(dependency.handler):
                features[module].update(indices)
    removed = {kind.name: _components(members, features) for kind, members in by_kind(groups).items()}
    return PruningPlan.for_model(model, **removed)


def _make_pruner(model: PreTrainedModel, example: dict[str, torch.Tensor], groups: Sequence[Group], share: float):
    """Torch-Pruning's pruner, which is restricted to the library's components."""
    import torch_pruning

    free = {projection.module for group in groups for projection in (*group.writers, *group.followers)}
    heads = of_kind(groups, "heads")
    inner = tuple(projection.module for group in groups if group not in heads for projection in group.writers)
    return torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        # A scope apart from heads: else neurons would be ranked together with the width of heads, which stays.
        pruning_ratio_dict={inner: share},
        head_pruning_ratio=share,
        prune_num_heads=True,
        prune_head_dims=False,
        num_heads={projection.module: group.num_components for group in heads for projection in group.writers},
        # Torch-Pruning adds to these dictionaries, and its defaults are shared by all pruners.
        in_channel_groups={},
        out_channel_groups={},
        ignored_layers=[module for module in model.modules() if not list(module.children()) and module not in free],
        output_transform=lambda outputs: outputs.logits,
    )


def _components(groups: Sequence[Group], features: Mapping[Any, set[int]]) -> dict[int, list[int]]:
    """By layer, the components that the removed input features of output projections belong to."""
    removed = {}
    for group in groups:
        size = group.reader.module.weight.shape[1] // group.num_components
        removed[group.layer] = sorted({feature // size for feature in features[group.reader.module]})
    return {layer: components for layer, components in removed.items() if components}
