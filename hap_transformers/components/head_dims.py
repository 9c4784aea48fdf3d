"""Dimensions of attention heads as components.

A head's value projection and its part of the output projection only ever appear as a product, and so do its query and
key projections. Each product keeps fewer dimensions than the head has: of value dimensions a row of the value
projection and a column of the output projection, of query/key dimensions a row of either projection. Attention works
with heads as wide as the widest that is left. To narrower ones, projections give zeros ([`spread_outputs`]). So a
layer is fastest whose heads all have equally many dimensions. A head without value dimensions is gone.

With grouped-query attention, a dimension belongs to a key/value head and to all its query heads. Rotary embeddings
turn query/key dimensions in pairs, by angles that belong to their places. There a component is a pair, and those that
are left stay where they are. Where norms act on queries and keys, the query/key dimensions of a head go together. In
both cases attention keeps the width of the dense model.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import Architecture
from .groups import Group, Kind, register_kind
from .heads import HEADS, dims_left, find_whole, fit_to_heads, heads_gone
from .heads import idle as idle_heads
from .projections import GroupedReader, GroupedWriter, NormedHeads, Projection
from .record import recorded_structure
from .runs import Runs, marks_of
from .spreading import Left, gather_inputs, hands_on, spread_outputs


def find_value_dims(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """Lists the value dimensions of a model's heads, first layer first."""
    groups = []
    for runs in _runs(model, architecture, VALUE_DIMS):
        heads = runs.whole
        reader = heads.reader
        if heads.shared > 1:
            reader = GroupedReader(**vars(reader), order=_by_component(VALUE_DIMS, runs, heads.shared))
        groups.append(_group(VALUE_DIMS, [heads.writers[2]], [], [reader], runs))
    return groups


def find_query_key_dims(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """Lists the query/key dimensions of a model's heads, first layer first."""
    groups = []
    for runs in _runs(model, architecture, QUERY_KEY_DIMS):
        heads = runs.whole
        query, key, _ = heads.writers
        if heads.shared > 1 or runs.marks is not None:
            query = GroupedWriter(**vars(query), order=_by_component(QUERY_KEY_DIMS, runs, heads.shared))
            key = GroupedWriter(**vars(key), order=_by_component(QUERY_KEY_DIMS, runs, 1))
        group = _group(QUERY_KEY_DIMS, [query, key], heads.followers, [], runs)
        group.masked = [_normed(query, heads)]
        group.masked += [p for p in heads.followers if p.name.endswith(heads.names.position_inputs[1:])]
        groups.append(group)
    return groups


def _normed(query: Projection, heads: Group) -> Projection:
    """What attention logits are products of: queries, or what a norm gives of them."""
    norm = heads.names.query_norm
    if norm is None:
        return query
    assert heads.around is not None
    return NormedHeads(norm, heads.around.get_submodule(norm), given_by=query)


def _runs(model: PreTrainedModel, architecture: Architecture, kind: Kind) -> list[Runs]:
    """The components of a kind that every head of every layer has left; heads that are gone have none."""
    found = []
    for heads in find_whole(model, architecture):
        assert heads.core is not None
        left = dims_left(heads.core)
        if left is None:
            lacks = heads.reader.in_features < heads.original * heads.shared * heads.head_size
            missing = _heads_gone(model.config, heads.layer) if lacks else ()
            left = {
                name: [0 if head in missing else heads.head_size // _unit(name, heads) for head in heads.kept]
                for name in (VALUE_DIMS.name, QUERY_KEY_DIMS.name)
            }
        marks = _marks(heads, left) if kind == QUERY_KEY_DIMS else None
        found.append(Runs(heads, list(left[kind.name]), left, _narrows(heads), marks))
    return found


def _heads_gone(config: PretrainedConfig, layer: int) -> list[int]:
    """The heads of a layer that went whole, by the record of heads or, after other layers' dimensions, by theirs."""
    of_dims = ((recorded_structure(config) or {}).get(VALUE_DIMS.name) or {}).get(str(layer), ())
    return heads_gone(config).get(layer) or [head for head, left in enumerate(of_dims) if not left]


def _unit(kind: str, heads: Group) -> int:
    """Dimensions that go together."""
    if kind != QUERY_KEY_DIMS.name or heads.names.bilinear:
        return 1
    return 2 if _in_pairs(heads) else heads.head_size


def _in_pairs(heads: Group) -> bool:
    """Whether query/key dimensions go in rotary pairs: a norm over all of them would change with any that goes."""
    return not heads.names.bilinear and heads.names.rotary and heads.names.query_norm is None


def _marks(heads: Group, left: Mapping[str, Sequence[int]]) -> list[str] | None:
    """Which rotary pairs every head has left: all or none, if none has gone by itself."""
    if not _in_pairs(heads):
        return None
    noted = vars(heads.core).get("pairs_left")
    return list(noted or [marks_of(count, heads.head_size // 2) for count in left[QUERY_KEY_DIMS.name]])


def _group(
    kind: Kind, writers: list[Projection], followers: list[Projection], readers: list[Projection], runs: Runs
) -> Group:
    count, heads = sum(runs.left), runs.whole
    group = Group(kind, heads.layer, writers, followers, readers, range(count), count, heads.core, heads.names, runs)
    group.around, group.scale, group.windowed = heads.around, heads.scale, heads.windowed
    group.alone, group.block, group.decoded = heads.alone, heads.block, heads.decoded
    return group


def _by_component(kind: Kind, runs: Runs, shared: int) -> tuple[int, ...]:
    """Features of so many heads that have components in common, component by component instead of head by head."""
    unit = _unit(kind.name, runs.whole)
    order: list[int] = []
    for count in runs.left:
        # The second dimensions of all pairs come after the first ones.
        run = torch.arange(count * shared * unit, device="cpu").view(shared, unit, count) + len(order)
        order += run.permute(2, 0, 1).flatten().tolist()
    return tuple(order)


def fit(group: Group) -> None:
    """Makes attention work with the dimensions that are left of every head.

    Without query/key dimensions a head weighs all tokens alike. Without value dimensions it is gone.
    """
    attention, runs = group.core, group.runs
    assert attention is not None and runs is not None
    heads = runs.whole
    dims = {**runs.of_kinds, **(dims_left(attention) or {}), group.kind.name: list(runs.left)}
    vars(attention)["dims_left"] = dims
    if runs.marks is not None:
        vars(attention)["pairs_left"] = list(runs.marks)
    alive = [place for place, left in enumerate(dims[VALUE_DIMS.name]) if left]
    value, query_key = (
        [dims[kind.name][place] * _unit(kind.name, heads) for place in alive] for kind in (VALUE_DIMS, QUERY_KEY_DIMS)
    )
    size, factor = _size_and_factor(heads, [*value, *query_key])
    width = len(alive) * heads.shared * size
    fit_to_heads(heads, alive, {heads.names.width: width, heads.names.head_size: size})
    if not alive:
        return
    given: dict[nn.Module, list[Left]] = defaultdict(list)
    of_keys: list[Left] = list(query_key)
    if (marks := _marks(heads, dims)) is not None:
        of_keys = [2 * marks[place] if "0" in marks[place] else size for place in alive]
    sizes: list[list[Left]] = [_by_query(of_keys, heads), of_keys, list(value)]
    for projection, left in zip(heads.writers, sizes, strict=True):
        given[projection.module] += left
    scaled = {heads.writers[0].module}
    for projection in heads.followers:
        given[projection.module] = of_keys
        if projection.name.endswith(heads.names.position_inputs[1]):
            scaled.add(projection.module)
    for module, left in given.items():
        spread_outputs(module, left, size, factor if module in scaled else 1.0)
    gather_inputs(heads.reader.module, _by_query(value, heads), size)
    _let_holders_hand_on(heads)


def _size_and_factor(heads: Group, left: Sequence[int]) -> tuple[int, float]:
    """The head size that attention works with, and a factor of queries that keeps the scale of its logits.

    Args:
        heads (`Group`): The heads as in the dense model.
        left (`Sequence[int]`): Dimensions of either kind that every head has left.
    """
    size = max(left, default=heads.head_size) if _narrows(heads) else heads.head_size
    return size, 1.0 if _keeps_scale(heads) else (size / heads.head_size) ** 0.5


def _narrows(heads: Group) -> bool:
    """Whether attention can work with narrower heads."""
    # Where queries, keys and values come from one module, it has no factor for queries alone.
    return heads.names.bilinear and (_keeps_scale(heads) or heads.writers[0].parts == 1)


def _keeps_scale(heads: Group) -> bool:
    """Whether the scale of attention logits does not depend on the head size that the module works with."""
    return not heads.names.scaled or bool({"scaling", "scale"} & vars(heads.core).keys())


def _let_holders_hand_on(heads: Group) -> None:
    """Lets adapters that are put onto projections spread and gather instead of them."""
    names, layer = heads.names, heads.around
    assert layer is not None
    for path in (names.query, names.key, names.value, names.output):
        hands_on(layer.get_submodule(path.rpartition(".")[0]))


def _by_query(left: Sequence[Left], heads: Group) -> list[Left]:
    """Dimensions of every query head, given those of the key/value heads."""
    return [of_head for of_head in left for _ in range(heads.shared)]


VALUE_DIMS = Kind(
    name="value_dims",
    singular="value dimension",
    label="value dimensions",
    find=find_value_dims,
    fit=fit,
    floor=1,
    floor_is_share=False,
    step=8,
    instead_of=HEADS.name,
    basis="aligned_heads",
    idle=idle_heads,
)
QUERY_KEY_DIMS = Kind(
    name="query_key_dims",
    singular="query/key dimension",
    label="query/key dimensions",
    find=find_query_key_dims,
    fit=fit,
    floor=1,
    floor_is_share=False,
    step=8,
    instead_of=HEADS.name,
    basis="aligned_heads",
    needs=VALUE_DIMS.name,
)
register_kind(QUERY_KEY_DIMS)
register_kind(VALUE_DIMS)
