"""Loads weights of the CIFAR networks that were trained elsewhere."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vision_scripts.cifar_models import CifarResNetForImageClassification


def load_dense_weights(model: CifarResNetForImageClassification, path: str | Path) -> None:
    """Loads weights of a network whose attributes are `stem`, `norm`, `blocks` and `classifier`, without a backbone.

    Args:
        model (`CifarResNetForImageClassification`): The network to load into.
        path (`str` or `Path`): The safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file, or its weights are not those of this network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}' with dense weights.")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a safetensors file: {error}.") from error
    head = "classifier."
    named = {name if name.startswith(head) else f"backbone.{name}": tensor for name, tensor in stored.items()}
    own = model.state_dict()
    wrong = sorted(name for name in own.keys() | named.keys() if _shape(own, name) != _shape(named, name))
    if wrong:
        sizes = f"{_shape(named, wrong[0])} in the file, {_shape(own, wrong[0])} in the network"
        raise ValueError(
            f"'{path}' has weights of another network: {len(wrong)} of {len(own)} tensors differ, such as "
            f"'{wrong[0].removeprefix('backbone.')}' ({sizes}). Name the right network, with as many classes."
        )
    model.load_state_dict(named)


def _shape(tensors: dict[str, torch.Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None
