"""Recovery: layers are tuned one by one, then all together for one cycle of AdamW, towards the dense network."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from torch.nn import functional as F
from transformers import PreTrainedModel

from hap_transformers import tune_layers
from hap_transformers.efficiency import bf16_is_fast, count_parameters, evaluating
from hap_transformers.training.distillation import distillation_loss
from vision_scripts.image_inputs import augmented
from vision_scripts.images import DecodedImages

from .data import Cifar, Collator


# Images a step of the tuning of a layer.
TUNING_BATCH = 64


@dataclass(frozen=True)
class Recovery:
    """How networks are trained after pruning, the same for all methods.

    Args:
        learning_rate (`float`): The highest one. It rises linearly for `warmup` of the steps and falls linearly to 0.
        distillation (`float`): Weight of the distance to the dense network's logits, against the loss of the labels.
        temperature (`float`): What logits are divided by there.
        batch_size (`int`): Images a step.
        weight_decay, warmup (`float`): Of AdamW and its cycle.
        tuned_images (`int`): Training images that layers are tuned on before, for three epochs, where channels went.
    """

    learning_rate: float = 3e-5
    distillation: float = 0.9
    temperature: float = 4.0
    batch_size: int = 128
    weight_decay: float = 1e-2
    warmup: float = 0.15
    tuned_images: int = 2048


def recover(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    data: Cifar,
    size: int | None,
    epochs: float,
    seed: int,
    settings: Recovery | None = None,
) -> None:
    """Trains a network on augmented training images. It is left as it is after the last step.

    Args:
        model (`PreTrainedModel`): The network; changed in place.
        dense (`PreTrainedModel`): The dense network, on the same device; only read.
        data (`Cifar`): The images.
        size (`int`, *optional*): Height and width that the networks want.
        epochs (`float`): Epochs.
        seed (`int`): Seed of the order of images and of their augmentation.
        settings (`Recovery`, *optional*): How it is trained.
    """
    settings = settings or Recovery()
    model.to(memory_format=torch.channels_last)
    total = max(1, round(epochs * len(data.train) / settings.batch_size))
    if count_parameters(model) < count_parameters(dense) and settings.tuned_images:
        batches = send_to_device(data.batches("train", settings.tuned_images, seed, size, TUNING_BATCH), model.device)
        tune_layers(model, dense, batches, progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    collator, kind = Collator(data.normalize, size), model.device.type
    torch.manual_seed(seed)
    model.train()
    with evaluating(dense):
        for step, images in zip(range(total), _drawn(data.train, settings.batch_size, seed), strict=False):
            share = (step + 0.5) / total
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(
                    share / settings.warmup, (1 - share) / (1 - settings.warmup)
                )
            batch = collator([images[i] for i in range(len(images))])
            pixels, labels = augmented(batch["pixel_values"].to(model.device)), batch["labels"].to(model.device)
            with torch.autocast(kind, torch.bfloat16, enabled=bf16_is_fast()):
                with torch.no_grad():
                    wanted = dense(pixels).logits
                with torch.enable_grad():
                    found = model(pixels).logits
            with torch.enable_grad():
                distance = distillation_loss({"logits": found}, {"logits": wanted}, settings.temperature)
                of_labels = F.cross_entropy(found.float(), labels)
                (settings.distillation * distance + (1 - settings.distillation) * of_labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def _drawn(images: DecodedImages, count: int, seed: int) -> Iterator[DecodedImages]:
    """So many images at a time, all of them in a random order, and again in another one."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        if len(left) < count:
            left = torch.cat([left, torch.randperm(len(images), generator=generator)])
        places, left = left[:count], left[count:]
        yield DecodedImages(images.pixels[places], images.labels[places])
