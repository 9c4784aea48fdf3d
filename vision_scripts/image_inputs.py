"""Makes batches of a task's images as a model takes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from vision_scripts.image_data import ImageTask
from vision_scripts.image_processors import Fit, fitting_size, make_image_processor, normalization
from vision_scripts.images import DecodedImages, Images, decode, measured_colours


# Images that take no more memory than this are decoded once.
MOST_BYTES = 2**31


class ImageCollator:
    """Makes a batch of examples, with colours normalized. Its memory format is the faster one for convolutions.

    Args:
        mean (`Sequence[float]`): What to subtract from each colour, after the scale.
        std (`Sequence[float]`): What to divide it by then.
        scale (`float`): What to multiply bytes by.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], scale: float = 1 / 255):
        self.mean, self.std = (torch.tensor(list(values)).view(-1, 1, 1) for values in (mean, std))
        self.scale = scale

    def __call__(self, examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Stacks images of shape `(3, height, width)`, bytes, and their labels."""
        batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        pixels = (batch["pixel_values"].float() * self.scale - self.mean) / self.std
        return {**batch, "pixel_values": pixels.contiguous(memory_format=torch.channels_last)}


def augmented(pixels: torch.Tensor, share: int = 8) -> torch.Tensor:
    """Shifts images at random, by reflection at their borders, and flips half of them.

    Args:
        pixels (`torch.Tensor`): Shape `(batch, channels, height, width)`.
        share (`int`, *optional*, defaults to 8): Images move by up to this part of their size: 32x32 ones by 4 pixels.

    Returns:
        `torch.Tensor`: Of the same shape, in memory with channels last.
    """
    count, _, height, width = pixels.shape
    margins = (height // share, width // share)
    padded = F.pad(pixels, (margins[1], margins[1], margins[0], margins[0]), mode="reflect")
    draw = partial(torch.randint, size=(count, 1), device=pixels.device)
    rows = draw(2 * margins[0] + 1) + torch.arange(height, device=pixels.device)
    columns = draw(2 * margins[1] + 1) + torch.arange(width, device=pixels.device)
    columns = torch.where(draw(2).bool(), columns, columns.flip(1))
    images = torch.arange(count, device=pixels.device)[:, None, None]
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass
class ImageInputs:
    """A task's images as a model takes them.

    Args:
        train, validation (`Images` or `DecodedImages`): The examples.
        collator (`ImageCollator`): Makes batches of them.
        processor (`BaseImageProcessor`): Does the same to other images; it is saved with the model.
        size (`tuple[int, int]`): Height and width.
    """

    train: Images | DecodedImages
    validation: Images | DecodedImages
    collator: ImageCollator
    processor: Any
    size: tuple[int, int]


def make_inputs(
    task: ImageTask,
    limits: Mapping[str, int | None],
    seed: int,
    processor: Any | None = None,
    size: int | Sequence[int] | None = None,
) -> ImageInputs:
    """Prepares a task's images for a model.

    Args:
        task (`ImageTask`): The task.
        limits (`Mapping[str, int]`): For each split, how many images to draw; `None` for all.
        seed (`int`): Seed of the draw.
        processor (`BaseImageProcessor`, *optional*): The model's. By default one is made: it resizes to `size`, and
            normalizes by the known mean and deviation of the data set's colours, or by those of the training images.
        size (`int` or `Sequence[int]`, *optional*): Height and width for that. By default all images must have the
            size of the first one.

    Raises:
        ValueError: If a split has no images, or an image is wrong.
    """
    fit = Fit(None if processor is None else fitting_size(processor), processor)
    if processor is None:
        first = decode(task.data["train"][0]["image"], "Image 0 of the train split")
        height, width = (size, size) if isinstance(size, int) else size or (first.height, first.width)
        made = make_image_processor((height, width), [0.0] * 3, [1.0] * 3)
        fit = Fit((height, width), made if size else None)
    splits: dict[str, Any] = {}
    for split, rows in task.data.items():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        places = sorted(order[: limits[split]].tolist())
        if not places:
            raise ValueError(f"Task '{task.name}' has no {split} images to use.")
        splits[split] = Images(rows, places, task.numbers, fit, split)
    first = splits["train"][0]["pixel_values"]
    if first.numel() * sum(map(len, splits.values())) <= MOST_BYTES:
        splits = {split: images.decoded() for split, images in splits.items()}
    if processor is None:
        known = (task.known.mean, task.known.std) if task.known else measured_colours(splits["train"])
        processor = make_image_processor((height, width), *known)
    collator = ImageCollator(*normalization(processor))
    return ImageInputs(**splits, collator=collator, processor=processor, size=tuple(first.shape[1:]))
