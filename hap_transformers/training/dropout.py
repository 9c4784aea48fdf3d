"""Switches dropout off while a model trains."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def _is_rate(name: str) -> bool:
    return "dropout" in name or name in ("drop_prob", "layerdrop")


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Sets all probabilities of dropout in a model to 0, and puts them back at the end.

    These are the `p` of dropout modules, and the numbers with "dropout" in their name that other modules hand to
    functions, such as those of attention. Layers that are left out at random count, too: stochastic depth
    (`drop_prob`) and `layerdrop`.

    Args:
        model (`nn.Module`): The model. It stays in training mode, which checkpoints of gradients and norms of batches
            need.
    """
    found = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and (_is_rate(name) or (name == "p" and isinstance(module, _DropoutNd)))
    ]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)
