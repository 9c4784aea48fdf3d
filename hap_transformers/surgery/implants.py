"""Low-rank linear maps in the place of removed components."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from ..components.groups import Group
from ..components.projections import Projection


def validate_implantable(model: PreTrainedModel, groups: Iterable[Group]) -> None:
    """Checks that linear components can be put into some groups.

    Raises:
        ValueError: If a group cannot have an implant, or has one already.
    """
    for group in groups:
        if group.implantable is None:
            raise ValueError(
                f"Cannot implant into the {group.kind.name} of layer {group.layer} of {type(model).__name__}: an "
                f"implant needs {group.kind.implant_needs}. Set implant_ratio=0. Nothing was pruned."
            )
        if group.implant_rank:
            raise ValueError(
                f"Layer {group.layer} of {type(model).__name__} has an implant of rank {group.implant_rank} already. "
                "Set implant_ratio=0 to prune it further. Nothing was pruned."
            )


def insert_implant(group: Group, rank: int) -> None:
    """Turns the last components of a group into an implant ([HAP](https://arxiv.org/abs/2101.08940)).

    Of neurons this is a linear map x -> B A x of some rank: `rank` neurons whose activation is the identity. A's rows
    are their rows of the input projection, B's columns their columns of the output projection, so the block is still
    two products with ordinary weights. A starts as the rows found there, which belonged to removed neurons; B is zero.

    Of channels these are `rank` channels with a 1x1 filter, which starts as the centre of the one that was there. What
    reads them starts as zero.

    Args:
        group (`Group`): The group, of a kind that takes implants; its last `rank` components are replaced.
        rank (`int`): The rank.
    """
    assert group.kind.implant is not None  # Plans with ranks for other kinds are refused.
    run = group.reader.in_features // group.num_components
    group.kind.implant(group, rank)
    if group.kind.linear_implants:
        set_input_map(group, _rows(group.writers[-1], rank).detach().clone())
    unread = group.reader.as_matrix.detach().clone()
    unread[:, -rank * run :] = 0
    group.reader.write(unread, None)


def set_input_map(group: Group, A: torch.Tensor) -> None:
    """Lets an implant read A x, without biases; A has the shape `(rank, features)`."""
    *gates, linear = group.writers
    with torch.no_grad():
        for gate in gates:
            _rows(gate, len(A)).zero_()  # The gate is 1 whatever it reads.
        _rows(linear, len(A)).copy_(A)
        for projection in group.writers:
            if projection.has_bias:
                projection.outputs_of(projection.module.bias)[-len(A) :] = 0


def _rows(projection: Projection, rank: int) -> torch.Tensor:
    """The rows of a projection that belong to the last `rank` components, as a view."""
    return projection.matrix(projection.module.weight)[-rank:]
