"""Writes files atomically: an interrupted write leaves the previous file."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, and replaces `path` by what was written there at the end.

    If writing is interrupted or the disk is full, the previous file stays.

    Args:
        path (`str` or `Path`): The file. The temporary path has the same ending, because some writers choose the
            format by it.

    Yields:
        `Path`: The path to write to.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # A device such as /dev/null.
        yield path
        return
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON. The message has none of its content, which may be long.
    """
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is no text") from None


@contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder inside `folder`, and moves the files written there into `folder` at the end.

    The files are moved one by one, `config.json` last: a new model cannot be loaded before all its files are there.

    Args:
        folder (`str` or `Path`): The destination; created if it does not exist.

    Yields:
        `Path`: The folder to write to.

    Raises:
        NotADirectoryError: If `folder` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise NotADirectoryError(f"'{folder}' is a file; name a folder to save into.")
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        files = [file.relative_to(unfinished) for file in unfinished.rglob("*") if not file.is_dir()]
        for file in sorted(files, key=lambda file: (str(file) == "config.json", str(file))):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished / file, folder / file)
        names = {str(file) for file in files}
        if any(name.endswith(".safetensors") for name in names):  # Old weights in another number of shards.
            for old in (*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors.index.json"):
                if old.name not in names:
                    old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
