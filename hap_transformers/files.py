"""Files that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and puts what was written in the place of `path` at the end.

    Whoever is interrupted meanwhile, or runs out of disk, finds the file from before.

    Args:
        path (`str` or `Path`): The file. The ending stays the same, as some writers choose the format by it.
    """
    path = Path(path)
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file all at once."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """Gives a folder within `folder` to write files to, and moves these into `folder` at the end, one by one.

    `config.json` comes last: a model that is new there cannot be loaded before it is whole.

    Args:
        folder (`str` or `Path`): Where the files go; made if it does not exist.
    """
    folder = Path(folder)
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in sorted(unfinished.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
