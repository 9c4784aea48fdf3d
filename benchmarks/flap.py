"""FLAP's score, as a method of the package: how much what a component writes fluctuates from token to token."""

from collections.abc import Iterator

import torch
from torch import nn

from hap_transformers import Method
from hap_transformers.components.groups import Group
from hap_transformers.sensitivity.batches import ScoredBatch
from hap_transformers.sensitivity.methods import Finished
from hap_transformers.sensitivity.statistics import SampleMoments
from hap_transformers.sensitivity.task import Samples, ScoringTask
from hap_transformers.tokens import mask_of, valid_tokens


def fluctuations(task: ScoringTask, batch: ScoredBatch) -> Samples:
    """Sums every output projection's inputs and their squares over a batch's tokens.

    The values of single examples are the scores that each example alone would give, before they are standardized.
    """
    read: dict[nn.Module, torch.Tensor] = {}
    readers = {group.reader.module: group.reader for group in task.groups}

    def see(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        read[module] = readers[module].read(args[0]).float()

    handles = [module.register_forward_pre_hook(see) for module in readers]
    try:
        with torch.no_grad():
            task.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    tokens = [read[group.reader.module] for group in task.groups]
    values = [importance(group, part.var(1)) for group, part in zip(task.groups, tokens, strict=True)]

    def sums() -> Iterator[torch.Tensor]:
        for group, part in zip(task.groups, tokens, strict=True):
            valid = valid_tokens(part, mask_of(batch.inputs, group.decoded))
            yield valid.new_tensor([len(valid)])
            yield valid.sum(0)
            yield valid.square().sum(0)

    return Samples(torch.cat(values, 1), sums=sums())


def importance(group: Group, variances: torch.Tensor) -> torch.Tensor:
    """Variance of each input times the squared norm of its weights, summed over a component's inputs.

    Args:
        group (`Group`): The components.
        variances (`torch.Tensor`): Shape `(..., inputs)`.

    Returns:
        `torch.Tensor`: Shape `(..., components)`.
    """
    norms = group.reader.matrix(group.reader.module.weight).detach().to(variances).square().sum(0)
    return (variances * norms).unflatten(-1, (group.num_components, -1)).sum(-1)


def standardized(task: ScoringTask, moments: SampleMoments, progress: bool = False) -> Finished:
    """FLAP's scores: importances less their mean, over their deviation, both over a layer's components of a kind.

    See An et al., [arXiv 2312.11983](https://arxiv.org/abs/2312.11983), sections 3.2 and 3.3.
    """
    scores = []
    for group, part in zip(task.groups, moments.sums.split([_length(group) for group in task.groups]), strict=True):
        count, total, squares = part.split((1, *2 * (group.reader.in_features,)))
        found = importance(group, squares / count - (total / count) ** 2)
        scores.append((found - found.mean()) / found.std())
    return Finished(torch.cat(scores))


def _length(group: Group) -> int:
    return 1 + 2 * group.reader.in_features


FLAP = Method(
    fluctuations,
    lambda task, means: means,
    standardized,
    lambda task: sum(_length(group) for group in task.groups),
)
