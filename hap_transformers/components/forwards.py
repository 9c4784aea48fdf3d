"""Models whose forwards were compiled or replaced: the model inside, and copies that run their own weights."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def eager_model(model: Any) -> Any:
    """The model inside of a compiled one (`torch.compile(model)`), or the model itself.

    What is done to the model inside holds for the compiled one, which compiles again when it is called.
    """
    return getattr(model, "_orig_mod", model)


def eager_copy(model: PreTrainedModel, shared: dict[int, Any] | None = None) -> PreTrainedModel:
    """A copy of a model without compiled forwards and those of accelerate and TRL, which would still run the original.

    Args:
        model (`PreTrainedModel`): The model.
        shared (`dict[int, Any]`, *optional*): Objects that the copy has in common with the model, by their `id`.

    Raises:
        ValueError: If another forward would, too.
    """
    validate_forwards(model)
    copied = copy.deepcopy(model, shared)
    for module in copied.modules():
        take_off_forward(module)
        vars(module).pop("_original_forward", None)
    return copied


def take_off_forward(module: nn.Module) -> Any:
    """Takes a compiled forward off a module, or one that accelerate or TRL put there and that calls the module's own.

    Accelerate does so for low precision, TRL for losses of tokens without logits.

    Returns:
        The forward, to be put back, or `None` if there is none.
    """
    forward = vars(module).get("forward")
    compiled = hasattr(forward, "_torchdynamo_orig_callable")
    of_trl = getattr(getattr(forward, "__func__", None), "__globals__", {}).get("__name__", "").startswith("trl.")
    if eager_model(module) is module and (compiled or of_trl or "_original_forward" in vars(module)):
        return vars(module).pop("forward", None)
    return None


def validate_forwards(model: PreTrainedModel) -> None:
    """Checks that the forwards of a copy of a model would be its own.

    Raises:
        ValueError: If a module's forward was replaced by a function that holds the module.
    """
    for path, module in model.named_modules():
        forward = vars(module).get("forward")
        compiled = hasattr(forward, "_torchdynamo_orig_callable")
        of_accelerate = {"_original_forward", "_old_forward"} & vars(module).keys()
        if forward is None or compiled or of_accelerate or getattr(forward, "__self__", None) is module:
            continue
        where = f"'{path}' of this {type(model).__name__}" if path else f"This {type(model).__name__}"
        name = getattr(forward, "__qualname__", type(forward).__name__)
        raise ValueError(
            f"{where} has a replaced forward, '{name}', which in a copy of the model would still run the original. "
            "Define it in a subclass, or bind a function that takes the module as its first argument "
            "(module.forward = types.MethodType(function, module))."
        )
