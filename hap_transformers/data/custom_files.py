"""Labelled texts from custom files: their columns, and what their labels are."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from .reading import Row, read_rows


WHOLE, NUMBER = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
TRUTH = {"true": True, "false": False}


def load_custom_files(
    train: str, validation: str, encoding: str | None = None
) -> tuple[DatasetDict, tuple[str, ...], list[str] | None]:
    """Reads a training and a validation file, each by its own ending.

    Args:
        train, validation (`str`): CSV or JSON files with a `label` column and one or two text columns.
        encoding (`str`, *optional*): Their encoding; by default UTF-8.

    Returns:
        `tuple`: The splits, the names of the text columns, and the names of the classes; `None` for a regression.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file cannot be read or lacks labels or texts, or the files do not fit each other.
    """
    files = {"train": train, "validation": validation}
    rows = {file: read_rows(file, encoding) for file in dict.fromkeys(files.values())}
    texts = _text_columns(train, rows[train])
    for file in rows:
        _validate_rows(file, rows[file], texts)
    labels = {split: _column(file, rows[file], "label") for split, file in files.items()}
    names = _class_names(labels["train"])
    if names is not None and len(names) < 2:
        raise ValueError(f"'{train}' has the label '{names[0]}' alone; a classifier needs two classes or more.")
    label = Value("float64") if names is None else ClassLabel(names=names)
    features = Features({**{text: Value("string") for text in texts}, "label": label})
    data = {}
    for split, file in files.items():
        numbers = _as_numbers(file, labels[split]) if names is None else _numbered(files, split, labels, names)
        columns = {text: [str(row[text]) for row in rows[file]] for text in texts}
        data[split] = Dataset.from_dict({**columns, "label": numbers}, features=features)
    return DatasetDict(data), texts, names


def _column(file: str, rows: Sequence[Row], name: str) -> list[Any]:
    """The values of a column. Those of CSV, which are words, become numbers or truth values if all can."""
    values = [row.get(name) for row in rows]
    given = [value.strip() for value in values if isinstance(value, str)]
    if not file.lower().endswith(".csv") or not given:
        return values
    if all(NUMBER.fullmatch(word) for word in given):
        number = int if all(WHOLE.fullmatch(word) for word in given) else float
        return [value and number(value) for value in values]
    if all(word.lower() in TRUTH for word in given):
        return [value and TRUTH[value.strip().lower()] for value in values]
    return values


def _text_columns(file: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """The one or two columns of texts beside the labels."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = tuple(
        name
        for name in columns
        if name != "label" and any(isinstance(value, str) for value in _column(file, rows, name))
    )
    if "label" in columns and len(columns) > 1 and not texts:
        others = ", ".join(name for name in columns if name != "label")
        raise ValueError(f"'{file}' has no texts: its columns {others} hold numbers, lists or objects. Write texts.")
    if not texts or "label" not in columns:
        raise ValueError(f"'{file}' has columns {columns}; it needs 'label' and one or two text columns.")
    if len(texts) > 2:
        raise ValueError(f"'{file}' has the text columns {texts}; keep the one or two to classify.")
    return texts


def _validate_rows(file: str, rows: Sequence[Row], texts: Sequence[str]) -> None:
    """Checks that every row has a label and every text, and nothing else in their place."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    missing = [name for name in ("label", *texts) if name not in columns]
    if missing:
        raise ValueError(f"'{file}' has columns {columns}; it lacks {', '.join(missing)}.")
    for name in ("label", *texts):
        for number, row in enumerate(rows, 1):
            value = row.get(name)
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"'{file}' has no {name} in row {number}; fill or remove it.")
            if isinstance(value, list | dict):
                what = "The labels" if name == "label" else f"The values of '{name}'"
                raise ValueError(f"{what} of '{file}' are lists or objects; each row needs one number or word.")


def _class_names(labels: Sequence[Any]) -> list[str] | None:
    """Names the classes of a training file: numbers sorted by value, words alphabetically; `None` for a regression."""
    if all(_is_number(label) for label in labels):
        if any(isinstance(label, float) for label in labels):
            return None
        return [str(label) for label in sorted(set(labels))]
    return sorted({str(label) for label in labels})


def _numbered(
    files: Mapping[str, str], split: str, labels: Mapping[str, Sequence[Any]], names: Sequence[str]
) -> list[int]:
    """Numbers a file's labels by their names. A number and a word of the same name are the same label."""
    known = {name: i for i, name in enumerate(names)}
    if {type(label) for label in labels["train"]} != {type(label) for label in labels["validation"]}:
        known = {**{name.casefold(): i for name, i in known.items()}, **known}  # JSON's `true` is Python's `True`.
    numbers = []
    for label in labels[split]:
        whole = isinstance(label, float) and label.is_integer() and str(label) not in known
        name = str(int(label)) if whole else str(label)
        numbers.append(known.get(name, known.get(name.casefold(), -1)))
    if -1 in numbers:
        unknown = sorted({str(label) for label, i in zip(labels[split], numbers, strict=True) if i < 0})
        raise ValueError(f"'{files[split]}' has labels that '{files['train']}' lacks: {unknown}.")
    return numbers


def _as_numbers(file: str, labels: Sequence[Any]) -> list[float]:
    """The labels of a regression, which may be written as words."""
    for number, label in enumerate(labels, 1):
        if not _is_number(label) and not (isinstance(label, str) and NUMBER.fullmatch(label.strip())):
            raise ValueError(
                f"'{file}' has the label '{label}' in row {number}; the training labels are floating point numbers."
            )
    return [float(label) for label in labels]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
