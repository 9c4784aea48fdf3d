"""The dense networks that are pruned."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import AutoModelForImageClassification, PreTrainedModel

from vision_scripts.cifar_configs import cifar_config
from vision_scripts.cifar_weights import load_dense_weights


CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A network that was trained on CIFAR-10.

    Args:
        load (`Callable`): Loads it from the folder of dense networks.
        size (`int`, *optional*): Height and width that normalized images are resized to, bilinearly.
    """

    load: Callable[[Path], PreTrainedModel]
    size: int | None = None


def _of_cifar(name: str, folder: Path) -> PreTrainedModel:
    model = AutoModelForImageClassification.from_config(cifar_config(name, num_labels=CLASSES))
    load_dense_weights(model, folder / f"{name}.safetensors")
    return model


def _of_transformers(name: str, folder: Path) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(folder / name)


NETWORKS = {
    "preresnet29": Network(partial(_of_cifar, "preresnet29")),
    "resnet56": Network(partial(_of_cifar, "resnet56")),
    "hf-resnet": Network(partial(_of_transformers, "hf-resnet"), 64),
}
