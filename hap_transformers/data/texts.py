"""Reads plain texts without labels: lines, columns of tables, or standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from .reading import decoded, read_rows


# Fewer different texts say nothing of a model.
LEAST = 8


def read_texts(files: Sequence[str], column: str | None = None, encoding: str | None = None) -> list[str]:
    """Reads texts from several files.

    Args:
        files (`Sequence[str]`): Files with one text a line, `.csv`, `.json`, `.jsonl` or `.parquet` files, or `"-"`
            for lines of the standard input.
        column (`str`, *optional*): The column of texts in tables. By default the only one that holds words.
        encoding (`str`, *optional*): Encoding of the files; by default UTF-8.

    Returns:
        `list[str]`: The texts in their order, each once, without empty ones.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file cannot be read, holds no text, or there are fewer than eight different texts in all.
    """
    found = [text for file in files for text in _texts_of(file, column, encoding)]
    texts = list(dict.fromkeys(text.strip() for text in found if text.strip()))
    if len(texts) < LEAST:
        raise ValueError(
            f"{', '.join(map(repr, files))}: {len(texts)} different texts in {len(found)} lines. Give at least "
            f"{LEAST}, better a thousand, such as the model will read."
        )
    return texts


def _texts_of(file: str, column: str | None, encoding: str | None) -> list[str]:
    if file == "-":
        return _lines("standard input", decoded("standard input", sys.stdin.buffer.read(), encoding))
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no file '{file}'.")
    ending = Path(file).suffix.lower()
    if ending == ".parquet":
        return _column(file, _parquet_rows(file), column)
    if ending in (".csv", ".json", ".jsonl"):
        return _column(file, read_rows(file, encoding), column)
    return _lines(file, decoded(file, Path(file).read_bytes(), encoding))


def _lines(name: str, text: str) -> list[str]:
    if "\0" in text:
        raise ValueError(f"'{name}' is no text: it has null characters. Give a file with one text a line.")
    return text.splitlines()


def _parquet_rows(file: str) -> list[dict]:
    try:
        return Dataset.from_parquet(file).to_list()
    except Exception as error:  # pyarrow raises what it likes.
        raise ValueError(f"'{file}' cannot be read as Parquet: {error}") from error


def _column(file: str, rows: list[dict], column: str | None) -> list[str]:
    names = list(rows[0]) if rows else []
    words = [name for name in names if any(isinstance(row.get(name), str) for row in rows)]
    if column is None and len(words) != 1:
        raise ValueError(
            f"'{file}' has the columns {', '.join(names)}, of which {', '.join(words) or 'none'} hold words. Name the "
            "one of the texts by --column."
        )
    chosen = column or words[0]
    if chosen not in names:
        raise ValueError(f"'{file}' has no column '{chosen}'; it has {', '.join(names)}.")
    texts = [row[chosen] for row in rows if row.get(chosen) is not None]
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"The column '{chosen}' of '{file}' has {wrong!r:.40} where a text is expected.")
    return texts
