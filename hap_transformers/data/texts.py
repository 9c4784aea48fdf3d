"""Reads plain texts or pairs of texts without labels: lines, columns of tables, or standard input."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from .reading import decoded, read_rows, require_file


# A text, or a pair of texts that a model reads together.
Text = str | tuple[str, str]

# Fewer different texts say nothing of a model.
LEAST = 8
# Endings of tables that are not read. As lines they would be texts with labels and a header.
OTHER_TABLES = (".tsv", ".xlsx", ".xls", ".arrow", ".feather")


def read_texts(files: Sequence[str], columns: Sequence[str] = (), encoding: str | None = None) -> list[Text]:
    """Reads texts from several files.

    Args:
        files (`Sequence[str]`): Files with one text a line, `.csv`, `.json`, `.jsonl` or `.parquet` files, or `"-"`
            for lines of the standard input.
        columns (`Sequence[str]`, *optional*): The column of texts in tables, or the two columns of pairs. By default
            the only column that holds words.
        encoding (`str`, *optional*): Encoding of the files; by default UTF-8.

    Returns:
        `list[str]` or `list[tuple[str, str]]`: The texts or pairs in their order, each once, without empty ones.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is a table of another format or cannot be read, holds no text, lacks a column or has
            none, more than two columns are named, or there are fewer than eight different texts in all.
    """
    if len(columns) > 2 or len(set(columns)) < len(columns):
        raise ValueError(
            f"--column names {', '.join(columns)}; name the column of texts, or the two columns of pairs."
        )
    found = [row for file in files for row in _rows_of(file, columns, encoding)]
    stripped = dict.fromkeys(tuple(text.strip() for text in row) for row in found)
    texts = [row for row in stripped if all(row)]
    if len(texts) < LEAST:
        what = "pairs of texts" if len(columns) == 2 else "texts"
        raise ValueError(
            f"{', '.join(map(repr, files))}: {len(texts)} different {what} in {len(found)} lines. Give at least "
            f"{LEAST}, better a thousand, such as the model will read."
        )
    return [(row[0], row[1]) if len(row) == 2 else row[0] for row in texts]


def _rows_of(file: str, columns: Sequence[str], encoding: str | None) -> list[tuple[str, ...]]:
    """The texts of a file, each in a tuple of one or two."""
    ending = Path(file).suffix.lower()
    if file != "-":
        require_file(file)
    if ending == ".parquet":
        return _of_columns(file, _parquet_rows(file), columns)
    if ending in (".csv", ".json", ".jsonl"):
        return _of_columns(file, read_rows(file, encoding), columns)
    if ending in OTHER_TABLES:
        raise ValueError(f"'{file}' is a table; save it as .csv, .json, .jsonl or .parquet, or give one text a line.")
    name = "standard input" if file == "-" else file
    if columns:
        raise ValueError(f"'{name}' is read line by line; --column is for .csv, .json, .jsonl and .parquet files.")
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    return [(line,) for line in _lines(name, decoded(name, content, encoding))]


def _lines(name: str, text: str) -> list[str]:
    if "\0" in text:
        raise ValueError(f"'{name}' is no text: it has null characters. Give a file with one text a line.")
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]  # Not at other separators, as U+2028.


def _parquet_rows(file: str) -> list[dict]:
    try:
        return Dataset.from_parquet(file).to_list()
    except Exception as error:  # pyarrow raises what it likes.
        raise ValueError(f"'{file}' cannot be read as Parquet: {error}") from error


def _of_columns(file: str, rows: list[dict], columns: Sequence[str]) -> list[tuple[str, ...]]:
    names = list(rows[0]) if rows else []
    words = [name for name in names if any(_has_words(row.get(name)) for row in rows)]
    if not columns and len(words) != 1:
        raise ValueError(
            f"'{file}' has the columns {', '.join(names)}, of which {', '.join(words) or 'none'} hold words. Name the "
            "one of the texts by --column, or the two of pairs by --column twice."
        )
    chosen = columns or words
    for name in chosen:
        if name not in names:
            raise ValueError(f"'{file}' has no column '{name}'; it has {', '.join(names)}.")
    for row in rows:
        for name in chosen:
            if row.get(name) is not None and not isinstance(row[name], str):
                raise ValueError(f"The column '{name}' of '{file}' has {row[name]!r:.40} where a text is expected.")
    return [tuple(row[name] for name in chosen) for row in rows if all(row.get(name) for name in chosen)]


def _has_words(value: Any) -> bool:
    """Whether a value is a text, and no number, which CSV files give as text, too."""
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False
