"""Images and labels from every source, and answers to wrong ones."""

import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from image_files import class_folders, encoded, parquet_folder, pixels_of, write_parquet
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from tiny import CIFAR10, needs_cifar10
from transformers import ViTConfig

from vision_scripts import image_data
from vision_scripts.image_data import load_image_task


def image_of(row):
    source = row["image"]["path"] if row["image"]["bytes"] is None else io.BytesIO(row["image"]["bytes"])
    return np.asarray(PILImage.open(source))


def test_parquet_files(tmp_path):
    task = load_image_task(data_dir=str(parquet_folder(tmp_path / "colours")))
    assert (task.name, task.labels, task.known, task.natural) == ("colours", ["0", "1", "2"], None, True)
    assert {split: len(rows) for split, rows in task.data.items()} == {"train": 24, "validation": 9}
    for i in (0, 4, 8):
        row = task.data["validation"][i]
        assert row["label"] == i % 3 and np.array_equal(image_of(row), pixels_of(i % 3, 100 + i))


@needs_cifar10
def test_cifar10_of_the_hub_format():
    task = load_image_task("cifar10", str(CIFAR10))
    assert {split: len(rows) for split, rows in task.data.items()} == {"train": 50000, "validation": 10000}
    assert task.labels[:2] == ["airplane", "automobile"] and image_of(task.data["train"][7]).shape == (32, 32, 3)
    labels = np.asarray(task.data["train"][:]["label"])
    assert (np.bincount(labels) == 5000).all()


@pytest.mark.parametrize("layout", ["one split", "train and test", "train and val"])
def test_folders_of_classes(tmp_path, layout):
    if layout == "one split":
        class_folders(tmp_path / "data", count=10)
    else:
        class_folders(tmp_path / "data" / "train", count=5)
        class_folders(tmp_path / "data" / layout.split()[-1], count=2)
    task = load_image_task(data_dir=str(tmp_path / "data"))
    counts = {"train": 27, "validation": 3} if layout == "one split" else {"train": 15, "validation": 6}
    assert {split: len(rows) for split, rows in task.data.items()} == counts
    assert task.labels == ["blue", "green", "red"]
    for row in task.data["validation"]:
        assert image_of(row).mean((0, 1)).argmax() == row["label"]


def test_digits():
    task = load_image_task()
    assert (task.name, len(task.labels), task.natural) == ("digits", 10, False)
    found = load_digits()
    known = {
        image.round().astype(int).tobytes(): label for image, label in zip(found.images, found.target, strict=True)
    }
    for row in task.data["validation"].select(range(50)):
        image = np.rint(image_of(row) * (16 / 255)).astype(int)
        assert known[image.tobytes()] == row["label"]
    assert sum(map(len, task.data.values())) == 1797


def test_hub_names(monkeypatch):
    """Columns and splits of the data set on the Hub, whose test labels may be secret."""
    asked = []

    def load(name, split):
        asked.append((name, split))
        features = Features(
            {"img": Image(), "fine_label": ClassLabel(names=["b", "a"]), "coarse_label": Value("int64")}
        )
        rows = {"img": [pixels_of(i, i) for i in range(4)], "fine_label": [0, 1, 0, 1], "coarse_label": [5] * 4}
        return [Dataset.from_dict(rows, features=features)] * 2

    monkeypatch.setattr(image_data, "load_dataset", load)
    task = load_image_task("cifar100")
    assert asked == [("uoft-cs/cifar100", ["train", "test"])] and task.labels == ["b", "a"]
    assert task.data["train"][:]["label"] == [0, 1, 0, 1] and task.known.mean[0] == pytest.approx(0.507, abs=1e-3)


def test_classes_are_numbered_as_the_checkpoint_numbers_them(tmp_path):
    task = load_image_task(data_dir=str(class_folders(tmp_path / "data", count=10)))
    names = ["Red", "blue", "green"]
    config = ViTConfig(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    config.architectures = ["ViTForImageClassification"]
    aligned = task.aligned_with(config)
    assert aligned.labels == names and aligned.numbers == [1, 2, 0]
    config.id2label, config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    with pytest.raises(ValueError, match=r"2 outputs \(cat, dog\), task 'data' needs 3 .* to run_image_hap.py"):
        task.aligned_with(config)
    assert task.aligned_with(config, ignore_mismatched_sizes=True) is task


def labelled(labels, validation=(0, 1), column="label", image="img", dtype=None):
    """Writes both splits with these labels."""

    def write(folder):
        for name, values in (("train", labels), ("test", validation)):
            images = [encoded(pixels_of(0, i)) for i in range(len(values))]
            features = {image: {"bytes": Value("binary"), "path": Value("string")}, column: dtype} if dtype else None
            write_parquet(folder / f"{name}.parquet", images, list(values), image, column, features)

    return write


def lists_in_place_of_images(folder):
    rows = {"img": [[[0.5, 0.5]]] * 2, "label": [0, 1]}
    for name in ("train", "test"):
        Dataset.from_dict(rows).to_parquet(folder / f"{name}.parquet")


def class_without_training(folder):
    class_folders(folder / "train", names=("cat", "dog"))
    class_folders(folder / "test", names=("cat", "dog", "newt"))


NAMED = ClassLabel(names=["a", "b"])


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda folder: (folder / "a.png").write_bytes(encoded(pixels_of(0, 0))), "has no folders of classes"),
        (lambda folder: (folder / "cat").mkdir(), "has no images in its folders"),
        (lambda folder: class_folders(folder, names=("cat",)), "one class alone, cat"),
        (class_without_training, "has no images of newt, which the validation split has"),
        (
            lambda folder: parquet_folder(folder).joinpath("train.parquet").rename(folder / "a.parquet"),
            "is named train",
        ),
        (lambda folder: (folder / "train.parquet").write_text("text"), "Cannot read the parquet files"),
        (labelled([0, 1], column="y"), r"columns \['img', 'y'\]; it needs one named label or fine_label"),
        (labelled([0, 1], image="picture"), r"columns \['picture', 'label'\]; it needs one named img or image"),
        (lists_in_place_of_images, "column 'img' of .* needs encoded images"),
        (
            labelled([0, 1, 1], validation=[0, 2]),
            "validation split of .* has the label 2 in row 1; the 2 classes are 0 to 1",
        ),
        (labelled([0, -1, 1]), "3 numbers from -1 to 1; number the classes from 0"),
        (labelled([0, 7, 1]), "3 numbers from 0 to 7; number the classes from 0"),
        (labelled([0, 1], validation=[-1, 0], dtype=NAMED), "label -1 in row 0; the 2 classes are a to b"),
        (labelled([0, None, 1]), "train split of .* has no label in row 1"),
        (labelled([0.5, 1.5]), "labels of .*float64"),
        (labelled(["a", "b"], validation=["a", "c"]), "label 'c' in row 1; the 2 classes are a to b"),
        (labelled([0, 1], validation=[]), "corresponds to no data"),
    ],
)
def test_wrong_files_are_named(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_image_task(data_dir=str(tmp_path))


def test_wrong_names():
    with pytest.raises(ValueError, match="Unknown data set 'cifar'; choose one of cifar10"):
        load_image_task("cifar")
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        load_image_task(data_dir="nowhere")


def test_labels_in_words(tmp_path):
    labelled(["dog", "cat", "dog"], validation=["cat", "dog"])(tmp_path)
    task = load_image_task(data_dir=str(tmp_path))
    assert task.labels == ["cat", "dog"] and task.data["train"][:]["label"] == [1, 0, 1]
