"""Image processors: the size and normalization that a model expects of its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from transformers import AutoImageProcessor
from transformers.utils import cached_file

from hap_transformers.components.releases import IMAGE_PROCESSOR


CONFIG = "preprocessor_config.json"


def load_image_processor(model: str) -> Any | None:
    """Loads the image processor of a model, if its folder or repository has one.

    Args:
        model (`str`): Hub name or folder.

    Raises:
        OSError, ValueError: If there is one that cannot be loaded.
    """
    found = cached_file(model, CONFIG, _raise_exceptions_for_missing_entries=False)
    return None if found is None else AutoImageProcessor.from_pretrained(model)


def make_image_processor(size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Any:
    """Makes an image processor that resizes and normalizes, and is saved with the model.

    Args:
        size (`tuple[int, int]`): Height and width.
        mean, std (`Sequence[float]`): Mean and standard deviation of each colour, in [0, 1].
    """
    made = getattr(transformers, IMAGE_PROCESSOR)
    height, width = size
    return made(size={"height": height, "width": width}, image_mean=list(mean), image_std=list(std))


def normalization(processor: Any) -> tuple[Sequence[float], Sequence[float], float]:
    """Mean, standard deviation and scale by which an image processor normalizes bytes."""
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return mean, std, processor.rescale_factor if processor.do_rescale else 1.0


def fitting_size(processor: Any) -> tuple[int, int] | None:
    """Height and width of images that an image processor leaves as they are; `None` if it also crops."""
    height, width = (processor.size.get(name) for name in ("height", "width"))
    crops = getattr(processor, "do_center_crop", None) or getattr(processor, "crop_pct", None)
    return (height, width) if height and width and not crops else None


@dataclass
class Fit:
    """Brings images to the size of a model's inputs, as bytes.

    Args:
        size (`tuple[int, int]`, *optional*): Height and width of images that stay as they are.
        processor (`BaseImageProcessor`, *optional*): Resizes and crops others. Without it there may be no others.
    """

    size: tuple[int, int] | None
    processor: Any | None = None

    def __call__(self, image: PIL.Image.Image, name: str) -> torch.Tensor:
        """Returns an image in RGB as a tensor of shape `(3, height, width)`.

        Raises:
            ValueError: If there is no processor and the image has another size.
        """
        if (image.height, image.width) == self.size:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.processor is None:
            raise ValueError(
                f"{name} has {image.height}x{image.width} pixels, others {'x'.join(map(str, self.size or ()))}. Pass "
                "--image_size to resize all images."
            )
        images = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return torch.from_numpy(np.clip(np.rint(images[0]), 0, 255).astype(np.uint8))
