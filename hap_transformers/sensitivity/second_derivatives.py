"""Names a loss whose second derivative torch does not have."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

from .methods import methods_without
from .output_curvature import UnsuitableLossError
from .outputs import graph_nodes
from .task import ScoringTask


logger = logging.get_logger(__name__)


@contextmanager
def named_second_derivatives(
    task: ScoringTask, loss: torch.Tensor, curvature: str, inputs: Sequence[torch.Tensor] = ()
) -> Iterator[None]:
    """Names the loss in the error of a second derivative that torch does not have.

    torch raises no error for functions that are marked as once differentiable. It leaves their part out of the second
    derivative, which then is wrong. Such functions are looked for in the loss's graph. Nor does it raise one for those
    that compute their gradient in the forward pass, as some fused losses do; all custom functions are warned about.

    Args:
        task (`ScoringTask`): The model and its loss.
        loss (`torch.Tensor`): The loss, with its graph.
        curvature (`str`): What the loss is differentiated in: `"logits"` or `"weights"`.
        inputs (`Sequence[torch.Tensor]`, *optional*): Tensors at which the graph ends. By default it is looked through
            to its leaves.

    Raises:
        ValueError: If the graph has such a function, in place of torch's error, and if the loss has no curvature.
    """
    functions: set[Any] = {getattr(type(node), "_forward_cls", None) for node in graph_nodes(loss, inputs)} - {None}
    for function in functions:
        if _once_differentiable(function):
            raise _missing(task, curvature, f"{function.__name__} is marked as once differentiable")
        logger.warning_once(
            f"{_capital(task.loss_name)} goes through {function.__name__}, a torch.autograd.Function. If its backward "
            "pass cannot be differentiated, as where gradients are computed in the forward pass, scores miss its "
            f"curvature in the {curvature} and are wrong. Then use one of {methods_without('logits', 'weights')}."
        )
    try:
        yield
    except UnsuitableLossError as error:
        raise ValueError(
            f"{_capital(task.loss_name)} {error} Use another loss (`loss_fn`), or one of {methods_without(curvature)}."
        ) from error
    except RuntimeError as error:  # NotImplementedError is one.
        if "not implemented" not in str(error) and "modified by an inplace operation" not in str(error):
            raise
        raise _missing(task, curvature, str(error)) from error


def _once_differentiable(function: Any) -> bool:
    """Whether `once_differentiable` decorates the backward pass of a `torch.autograd.Function`."""
    # The decorator leaves no other mark than its wrapper, whose code is torch's.
    backward = function.backward
    return hasattr(backward, "__wrapped__") and backward.__code__.co_filename == torch.autograd.function.__file__


def _missing(task: ScoringTask, curvature: str, cause: str) -> ValueError:
    return ValueError(
        f"torch has no second derivative of {task.loss_name}: {cause}. Methods that need the curvature in the "
        f"{curvature} cannot score it. Use one of {methods_without('logits', 'weights')}."
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
