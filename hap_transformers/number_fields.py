"""Numbers of settings, which files and command lines may give in another type than their field's."""

import operator
from typing import Any, get_args, get_type_hints


def as_number(name: str, value: Any, kind: type) -> Any:
    """A number as its field's type: `8.0` is a whole number, and `1e-4`, which YAML reads as a word, is a number.

    Args:
        name (`str`): The field.
        value (`Any`): What is given.
        kind (`type`): `int` or `float`. Where a float is wanted, a whole number is left as it is.

    Raises:
        ValueError: If the value is no such number.
    """
    if type(value) is kind or (type(value), kind) == (int, float):
        return value
    what = "a whole number" if kind is int else "a number"
    try:
        number = float(value)
        if isinstance(value, bool) or (kind is int and (isinstance(value, str) or not number.is_integer())):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be {what}, got {value!r}.") from None
    return kind(number)


def validate_whole(name: str, value: Any, least: int) -> None:
    """Checks an argument that counts something.

    Raises:
        ValueError: If it is not a whole number, or too small.
    """
    try:
        fits = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"`{name}` must be a whole number, {least} or more, got {value!r}.")


def convert_numbers(settings: Any) -> None:
    """Gives the numbers of a dataclass the types of their fields, in place.

    Raises:
        ValueError: If one is no number, or not a whole one.
    """
    # `HfArgumentParser` writes into the types of `dataclasses.fields`.
    for name, hint in get_type_hints(type(settings)).items():
        kinds = get_args(hint) or (hint,)
        kind = next((kind for kind in (int, float) if kind in kinds), None)
        value = getattr(settings, name)
        if kind is not None and not (value is None and type(None) in kinds):
            setattr(settings, name, as_number(name, value, kind))
