"""Numbers of the components that a plan removes, as plain integers."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ..components.groups import Group


Removed = dict[int, list[int]]
Value = TypeVar("Value")


def plain_removals(removed: Mapping[Any, Iterable[Any]]) -> Removed:
    """Layer number to the numbers of what is removed there, both ascending.

    Args:
        removed (`Mapping[Any, Iterable[Any]]`): The same with whole numbers of any type.

    Raises:
        TypeError: If something else is given for a layer.
        ValueError: If a layer is named twice.
    """
    return plain_layers(removed, _whole_numbers)


def plain_layers(given: Mapping[Any, Any], plain: Callable[[Any, Any], Value]) -> dict[int, Value]:
    """Layer numbers as integers, ascending, to what a function makes of a layer and what is given for it.

    Raises:
        ValueError: If a layer is named twice, such as by `"0"` and `"00"`.
    """
    found: dict[int, Value] = {}
    for layer, value in given.items():
        number = int(layer)
        if number in found:
            raise ValueError(f"Layer {number} is named twice; name it once.")
        found[number] = plain(layer, value)
    return dict(sorted(found.items()))


def _whole_numbers(layer: Any, chosen: Iterable[Any]) -> list[int]:
    try:
        given = list(chosen)
        numbers = sorted(map(operator.index, given))
    except TypeError:
        given, numbers = [chosen], []
    if not numbers and given or bool in map(type, given):
        raise TypeError(f"Cannot remove {chosen!r} from layer {layer}: give a list of whole numbers, such as [0, 3].")
    return numbers


def plain_implant(found: Any) -> int | list[int]:
    """A rank, or ascending numbers of components, each once, as plain integers."""
    if isinstance(found, Iterable):
        return sorted({operator.index(number) for number in found})
    return operator.index(found)


def validate_numbers(groups: Sequence[Group], removed: Mapping[int, Sequence[int]]) -> Removed:
    """Checks that every named layer and component exists.

    Args:
        groups (`Sequence[Group]`): All groups of one kind.
        removed (`Mapping[int, Sequence[int]]`): Layer number to numbers of components.

    Returns:
        `dict[int, list[int]]`: The same removals with sorted, plain integers, each once.

    Raises:
        ValueError: If a layer or number is out of range.
        TypeError: If something else than whole numbers is given for a layer.
    """
    plain = plain_removals(removed)
    kind, by_layer = groups[0].kind, {group.layer: group for group in groups}
    for layer, numbers in plain.items():
        if layer not in by_layer:
            raise ValueError(
                f"Cannot prune {kind.name} of layer {layer}: the model has layers 0 to {len(groups) - 1}. "
                "Nothing was pruned."
            )
        total = by_layer[layer].original
        wrong = [number for number in numbers if not 0 <= number < total]
        if wrong:
            where = "original model" if kind.keeps_numbers else "model as it is now"
            numbered = f"they are numbered 0 to {total - 1}, as in the {where}" if total else "it has none left"
            raise ValueError(f"Cannot prune {kind.name} {wrong} of layer {layer}: {numbered}. Nothing was pruned.")
    return {layer: sorted(set(numbers)) for layer, numbers in plain.items()}
