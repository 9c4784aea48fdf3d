"""The trainer of image classifiers: it augments the images that it trains on, and knows SGD as CNNs are trained."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hap_transformers import HapTrainer
from vision_scripts.image_inputs import augmented


class ImageTrainer(HapTrainer):
    """A `HapTrainer` that shifts and flips training images on the device. Scoring and refit see them as they are.

    With `optim="sgd"` it trains with Nesterov momentum of 0.9.

    Args:
        augment (`bool`, *optional*, defaults to `True`): Whether to augment.
        args, kwargs: Those of `HapTrainer`.
    """

    def __init__(self, *args: Any, augment: bool = True, **kwargs: Any):
        self.augment = augment
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trains on a batch as `HapTrainer.training_step` does, after it is augmented."""
        if self.augment:
            pixels = self._prepare_inputs(inputs)["pixel_values"]
            inputs = {**inputs, "pixel_values": augmented(pixels)}
        return super().training_step(model, inputs, *args, **kwargs)

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the optimizer's class and settings, as `Trainer.get_optimizer_cls_and_kwargs` does."""
        optimizer, settings = HapTrainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer is torch.optim.SGD:
            settings = {"momentum": 0.9, "nesterov": True, **settings}
        return optimizer, settings
