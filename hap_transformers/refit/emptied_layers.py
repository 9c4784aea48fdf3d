"""Layers that pruning has emptied: the reader in front of them is fitted to make up for what they added."""

from ..components.groups import Group
from .layer_runs import LayerRuns, is_refitted


def ends_of_emptied(pruned: LayerRuns, original: LayerRuns) -> dict[int, int]:
    """For every layer that emptied ones follow, the last of these.

    Only where blocks add to a residual stream that nothing normalizes in between: what they added is then within the
    reach of the reader in front of them.
    """
    if not pruned.norm_first or pruned.repeats:
        return {}
    count = len(pruned.layers)
    emptied = [not any(group.num_components for group in _inside(pruned, layer)) for layer in range(count)]
    before = [not any(group.num_components for group in _inside(original, layer)) for layer in range(count)]
    ends: dict[int, int] = {}
    for layer in range(count - 1):
        last = layer
        while last + 1 < count and emptied[last + 1] and pruned.lists[last + 1] == pruned.lists[layer]:
            last += 1
        fitted = [group for group in _inside(pruned, layer) if group.num_components]
        adds = fitted and all(_adds(group) for group in (fitted[-1], *_inside(pruned, last)))
        if adds and not all(before[layer + 1 : last + 1]):
            ends[layer] = last
    return ends


def in_front(pruned: LayerRuns, layer: int) -> Group:
    """The last group of a layer that has anything left."""
    return [group for group in _inside(pruned, layer) if group.num_components][-1]


def _inside(runs: LayerRuns, layer: int) -> list[Group]:
    """The groups of a layer that a refit changes."""
    return [group for group in runs.all_groups if group.block == layer and is_refitted(group)]


def _adds(group: Group) -> bool:
    """Whether what the reader gives is added to the residual stream as it is."""
    return not group.alone and group.shortcut is None and group.norm is None and not group.windowed
