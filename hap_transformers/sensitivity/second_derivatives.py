"""Names a loss whose second derivative torch does not have."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .methods import METHODS
from .outputs import graph_nodes
from .task import ScoringTask


@contextmanager
def named_second_derivatives(
    task: ScoringTask, loss: torch.Tensor, curvature: str, inputs: Sequence[torch.Tensor] = ()
) -> Iterator[None]:
    """Names the loss in the error of a second derivative that torch does not have.

    torch raises no error for functions that are marked as once differentiable. It leaves their part out of the second
    derivative, which then is wrong. Such functions are looked for in the loss's graph.

    Args:
        task (`ScoringTask`): The model and its loss.
        loss (`torch.Tensor`): The loss, with its graph.
        curvature (`str`): What the loss is differentiated in: `"logits"` or `"weights"`.
        inputs (`Sequence[torch.Tensor]`, *optional*): Tensors at which the graph ends. By default it is looked through
            to its leaves.

    Raises:
        ValueError: If the graph has such a function, and in place of torch's error.
    """
    if marked := next((name for node in graph_nodes(loss, inputs) if (name := _once_differentiable(node))), None):
        raise _missing(task, curvature, f"{marked} is marked as once differentiable")
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one.
        if "not implemented" not in str(error):
            raise
        raise _missing(task, curvature, str(error)) from error


def _once_differentiable(node: Any) -> str | None:
    """Name of a node's `torch.autograd.Function`, if `once_differentiable` decorates its backward pass."""
    function = getattr(type(node), "_forward_cls", None)
    if function is None:
        return None
    # The decorator leaves no other mark than its wrapper, whose code is torch's.
    backward = function.backward
    is_wrapper = hasattr(backward, "__wrapped__") and backward.__code__.co_filename == torch.autograd.function.__file__
    return function.__name__ if is_wrapper else None


def _missing(task: ScoringTask, curvature: str, cause: str) -> ValueError:
    others = [name for name, method in METHODS.items() if method.curvature is None]
    return ValueError(
        f"torch has no second derivative of {task.loss_name}: {cause}. Methods that need the curvature in the "
        f"{curvature} cannot score it. Use one of {', '.join(others)}."
    )
