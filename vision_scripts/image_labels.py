"""Names and numbers of the classes in a data set of images."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, DatasetDict, Value


def named_labels(labels: DatasetDict, where: str) -> tuple[list[str], dict[str, list[int]]]:
    """Names the classes of a data set, and numbers its labels.

    Args:
        labels (`DatasetDict`): For each split one column: whole numbers, with names of the classes or from 0 without
            gaps, or words.
        where (`str`): What to call the data set in messages.

    Returns:
        `tuple[list[str], dict[str, list[int]]]`: The names, and by split the numbers of the classes.

    Raises:
        ValueError: If a label is missing or not one of the classes, there are fewer than two classes, or the training
            split lacks one that the validation split has.
    """
    (column,) = labels["train"].column_names
    feature = labels["train"].features[column]
    values = {split: rows[:][column] for split, rows in labels.items()}
    for split, found in values.items():
        if None in found:
            raise ValueError(
                f"The {split} split of {where} has no label in row {found.index(None)}; fill or remove it."
            )
    present = set(values["train"])
    if isinstance(feature, ClassLabel):
        names = feature.names
    elif isinstance(feature, Value) and feature.dtype == "string":
        names = sorted(present)
        numbers = {name: number for number, name in enumerate(names)}
        values = {split: [numbers.get(value, value) for value in found] for split, found in values.items()}
    elif isinstance(feature, Value) and feature.dtype.startswith(("int", "uint")):
        names = [str(number) for number in sorted(present)]
        if sorted(present) != list(range(len(present))):
            raise ValueError(
                f"The labels of {where} are {len(present)} numbers from {min(present)} to {max(present)}; number the "
                "classes from 0 without gaps, or give names."
            )
    else:
        raise ValueError(f"The labels of {where} are {feature}; give whole numbers from 0, or names.")
    if len(names) < 2:
        raise ValueError(f"{where} has one class alone, {names[0]}; a classifier needs two or more.")
    _validate_known(values, names, where)
    return names, values


def _validate_known(values: Mapping[str, Sequence[Any]], names: Sequence[str], where: str) -> None:
    """Refuses labels beyond the classes, and classes to validate on that there is nothing to learn of."""
    known = range(len(names))
    for split, found in values.items():
        beyond = next((row for row, value in enumerate(found) if value not in known), None)
        if beyond is not None:
            raise ValueError(
                f"The {split} split of {where} has the label {found[beyond]!r} in row {beyond}; the {len(names)} "
                f"classes are {names[0]} to {names[-1]}."
            )
    if unlearned := sorted(set(values["validation"]) - set(values["train"])):
        raise ValueError(
            f"The training split of {where} has no images of {', '.join(names[number] for number in unlearned)}, "
            "which the validation split has."
        )
