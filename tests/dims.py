"""Dimensions of heads, removed by a plan or masked by hand."""

import copy
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D
from zoo import HEADS, Tiny

from hap_transformers import PruningPlan, apply_plan


ALL = "all"
# Layer to head to the query/key and value dimensions that it loses.
Gone = dict[int, dict[int, tuple[Any, Any]]]
CASES: dict[str, Gone] = {
    "some": {0: {0: ([0, 2], [1]), 2: ([3], [0, 1, 3])}, 1: {1: ([], [0, 1]), 3: ([0, 1, 2], [])}},
    "a head": {0: {1: (ALL, ALL), 2: ([1], [])}, 1: {3: (ALL, ALL), 0: ([], [2])}},
    "all heads": {0: {head: (ALL, ALL) for head in range(HEADS)}, 1: {0: ([0], [0])}},
    "narrower": {
        0: {0: ([0, 1], [0, 1]), 1: ([0], [2]), 2: ([3], [1]), 3: ([0, 2], [3])},
        1: {0: (ALL, ALL), 1: ([1, 2, 3], [0, 1]), 2: ([0, 2], [2, 3]), 3: ([0, 1], [1, 2, 3])},
    },
    "even": {
        0: {head: ([head, (head + 1) % HEADS], [1, 3]) for head in range(HEADS)},
        1: {0: (ALL, ALL), **{head: ([head], [3 - head]) for head in range(1, HEADS)}},
    },
    "no queries": {0: {head: (ALL, []) for head in range(HEADS)}, 1: {2: (ALL, [1])}},
}


# Query/key dimensions go in rotary pairs, or all of a head together.
PAIRED, WHOLE = ("llama", "mistral", "modernbert", "qwen2"), ("qwen3",)


def query_keys_of_head(model, size: int) -> int:
    """Query/key components of a head with so many dimensions."""
    return {**dict.fromkeys(PAIRED, size // 2), **dict.fromkeys(WHOLE, 1)}.get(model.config.model_type, size)


def query_keys_gone(model, size: int, dims: Any) -> list[int]:
    """The query/key components of a head that go with these dimensions; other parts of a pair go with it."""
    count = query_keys_of_head(model, size)
    if count == 1:  # Dimensions of such a head stay if some of them do.
        return [0] if dims == ALL else []
    return list(range(count)) if dims == ALL else sorted({dim % count for dim in dims})


def numbers(model, tiny: Tiny, gone: Gone) -> dict[str, dict[int, list[int]]]:
    """What a plan for a model with all dimensions names."""
    found: dict[str, dict[int, list[int]]] = {"query_key_dims": {}, "value_dims": {}}
    for layer, heads in gone.items():
        size = head_size(model, tiny, layer)
        for head, (query_key, value) in heads.items():
            values = list(range(size)) if value == ALL else value
            found["value_dims"].setdefault(layer, []).extend(head * size + dim for dim in values)
            own = query_keys_gone(model, size, query_key)
            first = head * query_keys_of_head(model, size)
            found["query_key_dims"].setdefault(layer, []).extend(first + number for number in own)
    return found


def without(model, tiny: Tiny, gone: Gone):
    """A copy of a model that has lost dimensions."""
    pruned = copy.deepcopy(model)
    apply_plan(pruned, PruningPlan.for_model(pruned, **numbers(pruned, tiny, gone)))
    return pruned


def _part(module, path: str, paths: tuple[str, ...], place: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows and biases of one of a layer's query, key and value projections."""
    weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
    parts, part = paths.count(path), paths[:place].count(path)
    bias = None if module.bias is None else module.bias.data.chunk(parts)[part]
    return weight.chunk(parts)[part], bias


def _layer(model, tiny: Tiny, layer: int):
    return model.get_submodule(tiny.layer.format(layer))


def head_size(model, tiny: Tiny, layer: int = 0) -> int:
    """Dimensions of a dense model's heads."""
    path = tiny.heads_in[2]
    return len(_part(_layer(model, tiny, layer).get_submodule(path), path, tiny.heads_in, 2)[0]) // HEADS


def masked_dims(model, tiny: Tiny, gone: Gone):
    """A copy of a dense model with zeros in the places of these dimensions."""
    copied = copy.deepcopy(model)
    for number, heads in gone.items():
        layer, size = _layer(copied, tiny, number), head_size(copied, tiny, number)
        parts = [_part(layer.get_submodule(path), path, tiny.heads_in, i) for i, path in enumerate(tiny.heads_in)]
        for name in ("pos_key_proj", "pos_query_proj"):  # DeBERTa's projections of relative positions.
            modules = [module for path, module in layer.named_modules() if path.endswith(name)]
            parts += [(m.weight.data, m.bias if m.bias is None else m.bias.data) for m in modules]
        out = layer.get_submodule(tiny.heads_out)
        columns = (out.weight.data if isinstance(out, Conv1D) else out.weight.data.T).unflatten(0, (HEADS, -1, size))
        for head, (query_key, value) in heads.items():
            count = query_keys_of_head(model, size)
            query_key = [dim for own in query_keys_gone(model, size, query_key) for dim in range(own, size, count)]
            for place, (weight, bias) in enumerate(parts):
                dims = value if place == 2 else query_key
                for tensor in (weight, bias):
                    if tensor is not None:
                        tensor.unflatten(0, (HEADS, -1, size))[head][:, _index(dims)] = 0
            columns[head][:, _index(value)] = 0
    return copied


def _index(dims):
    return slice(None) if dims == ALL else dims


def left_of(group) -> list[int]:
    """Components that each head has left."""
    return list(group.runs.left)
