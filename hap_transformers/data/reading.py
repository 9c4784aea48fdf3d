"""Reads CSV and JSON files. Errors name the file and the row."""

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

Row = dict[str, Any]
# The standard library's limit of 131,072 characters is less than some documents have.
FIELD_LIMIT = 2**31 - 1
# Other separators than commas that programs write into CSV files.
OTHER_SEPARATORS = ";\t|"
# What files that gzip has written begin with.
GZIP = b"\x1f\x8b"


def read_rows(file: str, encoding: str | None = None) -> list[Row]:
    """Reads a file by its ending: `.csv` with a header, or `.json` and `.jsonl` with one object a row.

    Args:
        file (`str`): The file.
        encoding (`str`, *optional*): Its encoding; by default UTF-8.

    Returns:
        `list[dict]`: The rows, with `None` where a value is missing. All values of a CSV file are words.

    Raises:
        FileNotFoundError, IsADirectoryError: If there is no such file, or it is a folder.
        ValueError: If the ending is another one, or the file cannot be read as its ending says.
    """
    require_file(file)
    reader = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _json_rows}.get(Path(file).suffix.lower())
    if reader is None:
        raise ValueError(f"'{file}' is neither CSV nor JSON; expected .csv, .json or .jsonl.")
    rows = reader(file, decoded(file, Path(file).read_bytes(), encoding))
    if not rows:
        raise ValueError(f"'{file}' has no rows.")
    return rows


def require_file(file: str) -> None:
    """Checks that there is something to read by a name; a pipe such as `/dev/fd/63` will do.

    Raises:
        FileNotFoundError: If there is nothing.
        IsADirectoryError: If it is a folder.
    """
    if not Path(file).exists():
        raise FileNotFoundError(f"There is no file '{file}'.")
    if Path(file).is_dir():
        raise IsADirectoryError(f"'{file}' is a folder; name a file.")


def decoded(file: str, content: bytes, encoding: str | None) -> str:
    """A file's text. A file that proves to be UTF-8 is read as such, whatever the flag for all files says.

    Raises:
        ValueError: If the content is compressed or of another encoding, or the encoding is unknown.
    """
    try:
        "".encode(encoding or "utf-8")
    except LookupError:
        raise ValueError(f"Python knows no encoding '{encoding}'; pass one such as --encoding latin-1.") from None
    if content.startswith(GZIP):
        raise ValueError(f"'{file}' is compressed; unpack it, for example by gunzip.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if encoding is None:
            if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(
                    f"'{file}' is not UTF-8: it begins with the byte order mark of UTF-16. Pass --encoding utf-16."
                ) from None
            line = content[: error.start].count(b"\n") + 1
            raise ValueError(
                f"'{file}' is not UTF-8: byte 0x{content[error.start]:02x} in line {line}. Pass its encoding, such as "
                "--encoding latin-1."
            ) from None
    else:
        if encoding is None:
            return text
        if not content.isascii():
            if encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "utf-8-sig"):
                logger.warning(f"'{file}' is UTF-8, so it is not read as {encoding}.")
            return text
    try:
        return content.decode(encoding)
    except UnicodeError as error:
        raise ValueError(f"'{file}' is not {encoding}: {error}. Pass another --encoding.") from None


def _csv_rows(file: str, text: str) -> list[Row]:
    limit = csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        lines = [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise ValueError(f"'{file}' cannot be read as CSV: {error} in line {reader.line_num}.") from error
    finally:
        csv.field_size_limit(limit)
    if len(header) == 1 and (found := next((mark for mark in OTHER_SEPARATORS if mark in header[0]), None)):
        raise ValueError(
            f"'{file}' separates its columns by {found!r}, not by commas: its header is '{header[0]}'. Save it with "
            "commas."
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"'{file}' names the column '{twice[0]}' more than once; rename one.")
    for number, (line, fields) in enumerate(lines, 1):
        if len(fields) != len(header):
            raise ValueError(
                f"'{file}' has {len(fields)} fields in row {number} (line {line}) and {len(header)} in its header. "
                "Put texts that contain commas or quotes in quotes."
            )
        if [name.strip() for name in fields] == header:
            raise ValueError(f"'{file}' repeats its header in row {number} (line {line}); remove that row.")
    return [dict(zip(header, (word or None for word in fields), strict=True)) for _, fields in lines]


def _json_rows(file: str, text: str) -> list[Row]:
    where = ""
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = []
            for number, line in enumerate(filter(str.strip, text.split("\n")), 1):
                where = f" in row {number}"
                rows.append(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"'{file}' cannot be read as JSON{where}: {error}. Expected one object a line, or a list of objects."
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"'{file}' has {json.dumps(row)[:40]} in row {number} where an object is expected.")
    return rows
