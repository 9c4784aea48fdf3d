"""Ranks of heads: how many dimensions each of them has left."""

from transformers import PreTrainedModel

from ..components.groups import Group, find_groups


# For every kind of dimension, a row of ranks a layer, a number a head.
Ranks = dict[str, list[list[int]]]


def ranks_of(group: Group) -> list[int]:
    """The dimensions that every head of a group has left, counted one by one where several go together."""
    assert group.runs is not None  # Only dimensions are parts of heads.
    unit = group.writers[-1].out_features // max(group.num_components, 1)
    return [unit * count for count in group.runs.left]


def head_ranks(model: PreTrainedModel) -> Ranks:
    """The ranks of a model's heads; empty where heads are whole or gone.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture, pruned or not.
    """
    found: Ranks = {}
    for group in find_groups(model):
        if group.runs is not None:
            found.setdefault(group.kind.name, []).append(ranks_of(group))
    return found


def left_of(group: Group) -> tuple[int, int | None]:
    """What a group has left of its kind, and how many the dense model had, if that is known.

    Dimensions of heads are counted one by one, also where several go together. Kinds that are numbered anew after each
    removal do not know the dense model's count.
    """
    if group.runs is not None:
        return sum(ranks_of(group)), len(group.runs.left) * group.runs.whole.head_size
    return group.num_components, group.original if group.kind.keeps_numbers else None
