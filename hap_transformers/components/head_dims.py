"""Dimensions of attention heads as components.

A head's value projection and its part of the output projection only ever appear as a product, and so do its query and
key projections. Each product keeps fewer dimensions than the head has: of value dimensions a row of the value
projection and a column of the output projection, of query/key dimensions a row of either projection. Attention itself
works with whole heads: projections give zeros in the places of dimensions that are gone ([`spread_outputs`]).

With grouped-query attention, a dimension belongs to a key/value head and to all its query heads.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from .architectures import Architecture
from .groups import Group, Kind, Runs, register_kind
from .heads import find as find_heads
from .heads import fit as fit_heads
from .heads import idle as idle_heads
from .projections import GroupedReader, GroupedWriter, Projection
from .spreading import gather_inputs, spread_outputs


def find_value_dims(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """Lists the value dimensions of a model's heads, first layer first."""
    return [_value_dims(heads) for heads in find_heads(model, architecture)]


def find_query_key_dims(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """Lists the query/key dimensions of a model's heads, first layer first."""
    return [_query_key_dims(heads) for heads in find_heads(model, architecture)]


def _value_dims(heads: Group) -> Group:
    value, dim = heads.writers[2], heads.head_size
    left = _left(value, heads.num_components)
    shared = heads.reader.in_features // max(value.out_features, 1)
    runs = Runs(left, dim, max(shared, 1))
    reader = heads.reader if shared < 2 else GroupedReader(**vars(heads.reader), order=_by_component(runs))
    return _group(VALUE_DIMS, heads, [value], [], [reader], runs)


def _query_key_dims(heads: Group) -> Group:
    query, key = heads.writers[:2]
    left = _left(key, heads.num_components)
    shared = query.out_features // max(key.out_features, 1)
    runs = Runs(left, heads.head_size, max(shared, 1))
    if shared > 1:
        query = GroupedWriter(**vars(query), order=_by_component(runs))
    return _group(QUERY_KEY_DIMS, heads, [query, key], heads.followers, [], runs)


def _group(
    kind: Kind,
    heads: Group,
    writers: list[Projection],
    followers: list[Projection],
    readers: list[Projection],
    runs: Runs,
) -> Group:
    count = sum(runs.left)
    return Group(kind, heads.layer, writers, followers, readers, range(count), count, heads.core, heads.names, runs)


def _left(projection: Projection, heads: int) -> list[int]:
    """Dimensions of every head that a projection has."""
    return projection.runs or heads * [projection.out_features // max(heads, 1)]


def _by_component(runs: Runs) -> tuple[int, ...]:
    """Features of the heads that share a key/value head, dimension by dimension instead of head by head."""
    order: list[int] = []
    for size in runs.left:
        first = len(order)
        order += [first + head * size + dim for dim in range(size) for head in range(runs.shared)]
    return tuple(order)


def fit_value_dims(group: Group) -> None:
    """Makes attention work with the value dimensions that are left; without any, it computes nothing."""
    runs = group.runs
    assert runs is not None
    _spread(group.writers, runs.left, runs.dense)
    gather_inputs(group.reader.module, runs.by_reader, runs.dense)
    if not group.num_components:
        fit_heads(group)


def fit_query_key_dims(group: Group) -> None:
    """Makes attention work with the query/key dimensions that are left; without any, it weighs all tokens alike."""
    runs = group.runs
    assert runs is not None
    query, *others = group.projections
    _spread([query], runs.by_reader, runs.dense)
    _spread(others, runs.left, runs.dense)


def _spread(projections: Sequence[Projection], left: Sequence[int], dim: int) -> None:
    for projection in projections:
        parts, _ = vars(projection.module).get("spread_outputs", (projection.parts * [None], dim))
        sizes = [left if part == projection.part else known for part, known in enumerate(parts)]
        spread_outputs(projection.module, sizes, dim)


VALUE_DIMS = Kind(
    name="value_dims",
    singular="value dimension",
    label="value dimensions",
    find=find_value_dims,
    fit=fit_value_dims,
    floor=1,
    floor_is_share=False,
    step=8,
    instead_of="heads",
    names_of="heads",
    idle=idle_heads,
)
QUERY_KEY_DIMS = Kind(
    name="query_key_dims",
    singular="query/key dimension",
    label="query/key dimensions",
    find=find_query_key_dims,
    fit=fit_query_key_dims,
    floor=1,
    floor_is_share=False,
    step=8,
    instead_of="heads",
    names_of="heads",
)
register_kind(VALUE_DIMS)
register_kind(QUERY_KEY_DIMS)
