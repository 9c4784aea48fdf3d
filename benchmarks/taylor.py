"""Torch-Pruning's Taylor importance of this package's components, where its own graph does not find them.

The graph of Torch-Pruning 1.6 loses a key/value head where Transformers repeats it for its query heads.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from glue_scripts.compare_glue.torch_pruning_plan import Gradients, loss_gradients
from hap_transformers import Sensitivity
from hap_transformers.components.groups import Group, find_groups, of_kind


def taylor(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]], kinds: Sequence[str]) -> Sensitivity:
    """Scores components as `GroupTaylorImportance` does by default.

    See Molchanov et al., [arXiv 1906.10771](https://arxiv.org/abs/1906.10771), for the expansion, and Fang et al.,
    [arXiv 2301.12900](https://arxiv.org/abs/2301.12900), for that of groups.

    Args:
        model (`PreTrainedModel`): The dense model.
        batches (`Iterable`): Batches with labels.
        kinds (`Sequence[str]`): Kinds to score.
    """
    groups, gradients = find_groups(model), loss_gradients(model, batches)
    scores = {kind: [importance(group, gradients) for group in of_kind(groups, kind)] for kind in kinds}
    return Sensitivity("taylor", scores)


def importance(group: Group, gradients: Gradients) -> torch.Tensor:
    """Sum of |w dL/dw| over a component's weights, over its mean over the group; shape `(num_components,)`."""
    products = {weight: (weight * gradients[weight]).detach().abs().double() for weight in group.parameters}
    found = group.sum_over_components(products)
    return found / found.mean()
