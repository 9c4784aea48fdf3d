"""Images in files, as users give them to scripts."""

import io

import numpy as np
from datasets import Dataset, Features, Value
from PIL import Image


def pixels_of(label, seed, size=(8, 8)):
    """A noisy image whose colour says its class."""
    noise = np.random.default_rng(seed).integers(0, 80, (*size, 3))
    noise[..., label % 3] += 150
    return noise.astype(np.uint8)


def encoded(image, form="PNG"):
    """The bytes of a file."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form)
    return file.getvalue()


def write_parquet(path, images, labels, column="img", label="label", features=None):
    """Writes a file as that of CIFAR-10 is: a struct of bytes and path, and numbers."""
    rows = {column: [{"bytes": image, "path": None} for image in images], label: labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=features and Features(features)).to_parquet(path)


def parquet_folder(folder, train=24, validation=9, **settings):
    """A folder with both splits of three colours."""
    for split, count, seed in (("train", train, 0), ("test", validation, 100)):
        labels = [i % 3 for i in range(count)]
        images = [encoded(pixels_of(label, seed + i, **settings)) for i, label in enumerate(labels)]
        write_parquet(folder / f"{split}.parquet", images, labels)
    return folder


def class_folders(folder, count=4, names=("blue", "green", "red"), sizes=((8, 8),)):
    """A folder of images a class."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(pixels_of(label, 10 * label + i, sizes[i % len(sizes)]))
            image.save(folder / name / f"{i}.png")
    return folder


BINARY = {"img": Value("binary"), "label": Value("int64")}
