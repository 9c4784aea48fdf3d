"""Other ways to choose what a language model loses."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from hap_transformers import PruningPlan
from hap_transformers.components.groups import by_kind, find_groups, layers


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> list[float]:
    """One minus the mean cosine of what a layer reads and gives, layer by layer.

    After Men et al., *ShortGPT*, [arXiv 2403.03853](https://arxiv.org/abs/2403.03853).
    """
    sums, tokens = torch.zeros(len(layers(model))), 0
    for batch in batches:
        states = model.base_model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        # The last of these is normalized; the last layer's own output is not among them.
        pairs = zip(states[:-1], states[1:], strict=True)
        sums += torch.stack([F.cosine_similarity(read, given, dim=-1).sum() for read, given in pairs])
        tokens += states[0].shape[:2].numel()
    return (1 - sums / tokens).tolist()


def drop_similar_layers(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], ratio: float) -> PruningPlan:
    """Plans to drop whole layers of least block influence, as many as come nearest to a share of the parameters."""
    influence = block_influence(model, batches)
    count = round(ratio * len(influence))
    gone = sorted(range(len(influence)), key=influence.__getitem__)[:count]
    found = by_kind(find_groups(model))
    removed = {kind.name: {i: range(members[i].num_components) for i in gone} for kind, members in found.items()}
    return PruningPlan.for_model(model, **removed)  # type: ignore[arg-type]
