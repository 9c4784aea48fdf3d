"""Switches dropout off while a model trains."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Sets all probabilities of dropout in a model to 0, and puts them back at the end.

    These are the `p` of dropout modules, and the numbers with "dropout" in their name that other modules hand to
    functions, such as those of attention.

    Args:
        model (`nn.Module`): The model. It stays in training mode, which checkpoints of gradients and norms of batches
            need.
    """
    found = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(module, _DropoutNd)))
    ]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)
