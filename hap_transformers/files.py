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
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # Such as /dev/null.
        yield path
        return
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
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
        files = [file.relative_to(unfinished) for file in unfinished.rglob("*") if not file.is_dir()]
        for file in sorted(files, key=lambda file: (str(file) == "config.json", str(file))):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unfinished / file, folder / file)
        names = {str(file) for file in files}
        if any(name.endswith(".safetensors") for name in names):  # Weights that were in another number of parts.
            for old in (*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors.index.json"):
                if old.name not in names:
                    old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
