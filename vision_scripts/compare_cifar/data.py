"""CIFAR-10 as the networks take it. The files are sorted by class, so images are drawn by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from vision_scripts.image_data import load_image_task
from vision_scripts.image_inputs import ImageCollator, make_inputs
from vision_scripts.images import DecodedImages


Batches = list[dict[str, torch.Tensor]]

BATCH_SIZE = 128


@dataclass
class Collator:
    """Makes a batch of normalized images, resized where a network wants that.

    Args:
        normalize (`ImageCollator`): Makes a batch of normalized images.
        size (`int`, *optional*): Height and width.
    """

    normalize: ImageCollator
    size: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Stacks images of shape `(3, height, width)`, bytes, and their labels."""
        batch = self.normalize(examples)
        if self.size is not None:
            batch["pixel_values"] = F.interpolate(batch["pixel_values"], self.size, mode="bilinear")
        return batch


@dataclass
class Cifar:
    """All images, decoded.

    Args:
        train, test (`DecodedImages`): The splits.
        normalize (`ImageCollator`): Makes a batch of normalized images.
    """

    train: DecodedImages
    test: DecodedImages
    normalize: ImageCollator

    @classmethod
    def load(cls, data_dir: str) -> "Cifar":
        """Reads `train*.parquet` and `test*.parquet` of a folder."""
        inputs = make_inputs(load_image_task("cifar10", data_dir), {"train": None, "validation": None}, seed=0)
        return cls(inputs.train, inputs.validation, inputs.collator)

    def batches(
        self, split: str, count: int, seed: int, size: int | None = None, batch_size: int = BATCH_SIZE
    ) -> Batches:
        """Draws images of `"train"` or `"test"`. A smaller draw of a seed is the start of a larger one."""
        images = drawn(vars(self)[split], count, seed)
        return list(DataLoader(images, batch_size, collate_fn=Collator(self.normalize, size)))


def drawn(images: DecodedImages, count: int, seed: int) -> DecodedImages:
    """Draws images without replacement."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return DecodedImages(images.pixels[order], images.labels[order])
