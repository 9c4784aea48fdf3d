"""Decodes labelled images, when they are asked for or all at once."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset

from vision_scripts.image_processors import Fit


# Images of more than 8 bits a colour, which a conversion would cut off.
WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
# Images to measure the mean and deviation of colours on.
MEASURED = 5000


class Images(torch.utils.data.Dataset):
    """Labelled images that are decoded when they are asked for.

    Args:
        rows (`Dataset`): Rows with an encoded `image` and a `label`.
        places (`Sequence[int]`): The rows to take.
        numbers (`Sequence[int]`): For each label, the output of the model that it belongs to.
        fit (`Fit`): Brings an image to the size of the model's inputs.
        split (`str`): Name of the split, for messages.

    Raises:
        ValueError: On access, if an image cannot be decoded, or has more than 8 bits a colour.
    """

    def __init__(self, rows: Dataset, places: Sequence[int], numbers: Sequence[int], fit: Fit, split: str):
        self.rows, self.places, self.fit, self.split = rows, places, fit, split
        labels = rows[:]["label"]
        self.labels = torch.tensor([numbers[labels[place]] for place in places])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        place = self.places[index]
        return {"pixel_values": self._pixels(place, self.rows[place]["image"]), "labels": self.labels[index]}

    def decoded(self) -> "DecodedImages":
        """Decodes all images, which must have one size, into memory."""
        encoded = self.rows.select(self.places)["image"]
        first = self[0]["pixel_values"]
        pixels = torch.empty(len(self), *first.shape, dtype=torch.uint8)
        for index, image in enumerate(encoded):
            pixels[index] = self._pixels(self.places[index], image)
        return DecodedImages(pixels, self.labels)

    def _pixels(self, place: int, image: Mapping[str, Any]) -> torch.Tensor:
        name = f"Image {place} of the {self.split} split"
        name = f"{name} ({image['path']})" if image["path"] else name
        return self.fit(decode(image, name), name)


class DecodedImages(torch.utils.data.Dataset):
    """Labelled images in memory.

    Args:
        pixels (`torch.Tensor`): Shape `(images, 3, height, width)`, bytes.
        labels (`torch.Tensor`): Numbers of the classes, shape `(images,)`.
    """

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def decode(image: Mapping[str, Any], name: str) -> PIL.Image.Image:
    """Decodes an image to three colours of 8 bits. Grey images get three equal colours.

    Args:
        image (`Mapping[str, Any]`): Its `bytes`, or the `path` of its file.
        name (`str`): What to call it in messages.

    Raises:
        ValueError: If it is no image, or its pixels are not finite or have more than 8 bits a colour.
    """
    source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
    if source is None:
        raise ValueError(f"{name} is missing.")
    try:
        opened = PIL.Image.open(source)
        opened.load()
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be decoded: {error}.") from error
    if opened.mode in WIDE_MODES:
        if not np.isfinite(np.asarray(opened)).all():
            raise ValueError(f"{name} has pixels that are not finite numbers (NaN or infinite).")
        raise ValueError(
            f"{name} has pixels of more than 8 bits (mode '{opened.mode}'), whose range is unknown. Convert it to 8 "
            "bits a colour."
        )
    return opened.convert("RGB")


def measured_colours(images: Images | DecodedImages) -> tuple[list[float], list[float]]:
    """Measures mean and standard deviation of each colour, in [0, 1], on up to `MEASURED` images.

    Raises:
        ValueError: If a colour is the same everywhere.
    """
    places = np.linspace(0, len(images) - 1, min(len(images), MEASURED)).astype(int).tolist()
    total, square, count = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0
    for place in places:
        pixels = images[place]["pixel_values"].flatten(1).double() / 255
        total, square, count = total + pixels.sum(1), square + pixels.square().sum(1), count + pixels.shape[1]
    mean = total / count
    deviation = (square / count - mean.square()).clamp(min=0).sqrt()
    if deviation.min() < 1e-4:
        raise ValueError("The training images have the same colour everywhere; there is nothing to learn from them.")
    return mean.tolist(), deviation.tolist()
