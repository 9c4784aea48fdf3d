"""What Torch-Pruning would remove: an external peer, through its own released package.

    pip install torch-pruning==1.6.0

After Fang et al., *DepGraph: Towards Any Structural Pruning*, [arXiv 2301.12900](https://arxiv.org/abs/2301.12900).
"""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from hap_transformers import PruningPlan
from hap_transformers.components.groups import attention_blocks, feed_forward_blocks
from hap_transformers.planning.budgets import make_budget


def torch_pruning_plan(
    model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], ratio: float
) -> PruningPlan:
    """Plans with Torch-Pruning's dependency graph and Taylor importance, ranked over all layers.

    The width of the residual stream stays, as in every other method. The same share of heads and of neurons goes: the
    smallest in steps of a hundredth that removes enough, as Torch-Pruning passes over layers that would lose all.

    Args:
        model (`PreTrainedModel`): A BERT-like classifier; its gradients are left at `None`.
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
    wanted = ratio * make_budget("params", model).dense
    try:
        for hundredths in range(round(100 * ratio), 100):
            plan = _plan(model, example, hundredths / 100)
            if plan.count_parameters(model) >= wanted:
                return plan
    finally:
        model.zero_grad(set_to_none=True)
    raise ValueError(f"Torch-Pruning removes less than {ratio:.0%} of the encoder whatever is asked of it.")


def _plan(model: PreTrainedModel, example: dict[str, torch.Tensor], share: float) -> PruningPlan:
    import torch_pruning

    attention, feed_forward = attention_blocks(model), feed_forward_blocks(model)
    blocks = [*attention, *feed_forward]
    owned = {projection.module for block in blocks for projection in block.inputs}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        # A scope of their own: else neurons would be ranked together with the width of heads, which stays.
        pruning_ratio_dict={tuple(projection.module for block in feed_forward for projection in block.inputs): share},
        head_pruning_ratio=share,
        prune_num_heads=True,
        prune_head_dims=False,
        num_heads={projection.module: block.num_components for block in attention for projection in block.inputs},
        # Torch-Pruning adds to these, and its defaults are one dictionary for all pruners.
        in_channel_groups={},
        out_channel_groups={},
        ignored_layers=[module for module in model.modules() if not list(module.children()) and module not in owned],
        output_transform=lambda outputs: outputs.logits,
    )
    removed = {block.output.module: set() for block in blocks}
    for group in pruner.step(interactive=True):  # Yields what to remove; nothing is, unless one asks for it.
        for dependency, features in group:
            module = dependency.target.module
            if module in removed and pruner.DG.is_in_channel_pruning_fn(dependency.handler):
                removed[module].update(features)

    def components(own: list) -> dict[int, list[int]]:
        sizes = [block.output.in_features // block.num_components for block in own]
        found = [
            sorted({feature // size for feature in removed[block.output.module]})
            for block, size in zip(own, sizes, strict=True)
        ]
        return {layer: features for layer, features in enumerate(found) if features}

    return PruningPlan.for_model(model, heads=components(attention), neurons=components(feed_forward))
