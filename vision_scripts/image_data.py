"""Loads labelled images: from the Hub, parquet files, folders of classes, or scikit-learn's digits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from transformers import PretrainedConfig

from hap_transformers.data.labels import numbers_in_order, order_of_classes
from vision_scripts.image_labels import named_labels


IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image"), ("label", "fine_label", "labels")
# Names of the split to validate on, of files and of folders, the preferred first.
VALIDATION = ("validation", "val", "valid", "test")
# Share of the examples that is held out where there is no such split, and the seed of the draw.
HELD_OUT, DIGITS_HELD_OUT, SPLIT_SEED = 0.1, 0.2, 20210114
HEAD = "ForImageClassification"


@dataclass(frozen=True)
class KnownDataset:
    """What is known of a data set by name.

    Args:
        hub (`str`): Its name on the Hub.
        image, label (`str`): Its columns.
        validation (`str`): The split to validate on, whose labels are public.
        mean, std (`tuple[float, ...]`): Mean and standard deviation of each colour in the training images, in [0, 1].
        labels (`tuple[str, ...]`, *optional*): Names of the classes, for files that only number them.
    """

    hub: str
    image: str
    label: str
    validation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...] = ()


DATASETS = {
    "cifar10": KnownDataset(
        "uoft-cs/cifar10",
        "img",
        "label",
        "test",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": KnownDataset(
        "uoft-cs/cifar100", "img", "fine_label", "test", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "imagenet-1k": KnownDataset(
        "ILSVRC/imagenet-1k", "image", "label", "validation", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ),
}


@dataclass
class ImageTask:
    """A loaded image classification task.

    Args:
        name (`str`): Name of the data set, or of the folder it is in.
        data (`DatasetDict`): Splits `train` and `validation`, with the columns `image`, not decoded, and `label`.
        labels (`list[str]`): Names of the classes, in the order of the model's outputs.
        numbers (`list[int]`): For each label in the data, the model's output that it belongs to.
        known (`KnownDataset`, *optional*): What is known of the data set.
        natural (`bool`, *optional*, defaults to `True`): Whether images show the same if they are flipped or shifted.
    """

    name: str
    data: DatasetDict
    labels: list[str]
    numbers: list[int]
    known: KnownDataset | None = None
    natural: bool = True

    def aligned_with(self, config: PretrainedConfig, *, ignore_mismatched_sizes: bool = False) -> "ImageTask":
        """Returns the task with its labels numbered as a checkpoint numbers them, by the names of the classes.

        Args:
            config (`PretrainedConfig`): The checkpoint's config, as it was loaded.
            ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): Whether the checkpoint gets a new head
                where its own has another number of outputs.

        Raises:
            ValueError: If the checkpoint is a classifier with another number of outputs.
        """
        order = order_of_classes(
            self.labels, config, task=self.name, head=HEAD, ignore_mismatched_sizes=ignore_mismatched_sizes
        )
        return self if order is None else replace(self, labels=order, numbers=numbers_in_order(self.labels, order))


def load_image_task(dataset_name: str | None = None, data_dir: str | None = None) -> ImageTask:
    """Loads a data set by name, from files, or the digits of scikit-learn.

    Args:
        dataset_name (`str`, *optional*): One of `DATASETS`: from the Hub, or in the files of `data_dir`.
        data_dir (`str`, *optional*): A folder with `train*.parquet` and, if there is another split,
            `validation*.parquet` or `test*.parquet`, each with a column of images and one of labels. Or a folder with
            a folder of images for each class, or with such folders within `train` and `validation` or `test`. Without
            a second split, a tenth of the images is held out.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the data set is unknown, or the files have no images, no labels or wrong ones.
    """
    if dataset_name is not None and dataset_name not in DATASETS:
        raise ValueError(
            f"Unknown data set '{dataset_name}'; choose one of {', '.join(DATASETS)}, or pass --data_dir alone."
        )
    known = DATASETS.get(dataset_name or "")
    if data_dir is not None:
        folder = Path(data_dir)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder '{data_dir}' (--data_dir).")
        name = dataset_name or folder.resolve().name
        data = _read_parquet(folder) if list(folder.rglob("*.parquet")) else _read_folders(folder)
        return _task(name, data, f"'{data_dir}'", known)
    if dataset_name is not None and known is not None:
        train, validation = load_dataset(known.hub, split=["train", known.validation])
        return _task(dataset_name, DatasetDict(train=train, validation=validation), f"'{known.hub}'", known)
    return replace(_task("digits", _digits(), "The digits of scikit-learn", None), natural=False)


def _read_parquet(folder: Path) -> DatasetDict:
    files = {split: sorted(map(str, folder.rglob(f"{split}*.parquet"))) for split in ("train", *VALIDATION)}
    if not files["train"]:
        raise ValueError(f"'{folder}' has parquet files, but none is named train*.parquet.")
    validation = next((split for split in VALIDATION if files[split]), None)
    named = {"train": files["train"], **({"validation": files[validation]} if validation else {})}
    try:
        data = load_dataset("parquet", data_files=named)
    except OSError:  # The cache's folder, not the files.
        raise
    except Exception as error:  # `datasets` wraps what the reader raises.
        raise ValueError(f"Cannot read the parquet files in '{folder}': {error.__cause__ or error}") from error
    return data if validation else _hold_out(data["train"])


def _read_folders(folder: Path) -> DatasetDict:
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    splits = {"train": "train", "validation": next((name for name in VALIDATION if name in names), "")}
    places = {split: folder / name for split, name in splits.items() if name} if "train" in names else {"": folder}
    for place in places.values():
        if not any(path.is_dir() for path in place.iterdir()):
            raise ValueError(
                f"'{place}' has no folders of classes and no parquet files; put the images of each class into a "
                "folder with its name."
            )
    files = {split or "train": f"{place}/*/**" for split, place in places.items()}
    try:
        data = load_dataset("imagefolder", data_files=files, drop_labels=False)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"'{folder}' has no images in its folders of classes: {error}") from error
    return data if "validation" in data else _hold_out(data["train"])


def _hold_out(data: Dataset, share: float = HELD_OUT) -> DatasetDict:
    parts = data.train_test_split(test_size=share, seed=SPLIT_SEED)
    return DatasetDict(train=parts["train"], validation=parts["test"])


def _digits() -> DatasetDict:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = [np.rint(image * (255 / 16)).astype(np.uint8) for image in found.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in found.target_names])})
    return _hold_out(Dataset.from_dict({"image": images, "label": found.target}, features=features), DIGITS_HELD_OUT)


def _task(name: str, data: DatasetDict, where: str, known: KnownDataset | None) -> ImageTask:
    """Checks both splits, and gives their columns the same names."""
    columns = data["train"].column_names
    image = _column(columns, (known.image, *IMAGE_COLUMNS) if known else IMAGE_COLUMNS, where)
    label = _column(columns, (known.label, *LABEL_COLUMNS) if known else LABEL_COLUMNS, where)
    for split in data.values():
        if missing := [column for column in (image, label) if column not in split.column_names]:
            raise ValueError(f"A split of {where} lacks {', '.join(missing)}; its columns are {split.column_names}.")
    _validate_images(data["train"].features[image], image, where)
    names, numbers = named_labels({split: rows.select_columns(label) for split, rows in data.items()}, where)
    if known and len(known.labels) == len(names) and names == [str(i) for i in range(len(names))]:
        names = list(known.labels)
    prepared = {}
    for split in ("train", "validation"):
        rows = data[split].select_columns(image).rename_columns({image: "image"} if image != "image" else {})
        rows = rows.cast_column("image", Image(decode=False))
        prepared[split] = rows.add_column("label", numbers[split], feature=Value("int64"))
    return ImageTask(name, DatasetDict(prepared), names, list(range(len(names))), known)


def _column(columns: Sequence[str], names: Sequence[str], where: str) -> str:
    for name in names:
        if name in columns:
            return name
    raise ValueError(f"{where} has columns {list(columns)}; it needs one named {' or '.join(dict.fromkeys(names))}.")


def _validate_images(feature: Any, column: str, where: str) -> None:
    """Refuses a column that holds other things than encoded images."""
    encoded = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    if not encoded and not isinstance(feature, Image) and getattr(feature, "dtype", "") not in ("binary", "string"):
        raise ValueError(
            f"The column '{column}' of {where} holds {feature}; it needs encoded images, such as bytes of PNG files."
        )
