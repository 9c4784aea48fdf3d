"""Low precision for scoring: autocast and, for fp16, a loss scale that is undone exactly."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..components.forwards import take_off_forward


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The precision of forward passes and matrix products. Sums are in float32 or better.

    In fp16 gradients underflow unless the loss is first multiplied by a large number, the attribute `scale`. The scale
    is a power of two, so dividing by it afterwards is exact. If a value overflows, the scale is lowered and the batch
    is repeated.

    Args:
        name (`str`, *optional*): `"bf16"`, `"fp16"`, or `None` for the model's precision.
        device_type (`str`): The type of the device that autocast runs on.

    Raises:
        ValueError: If `name` is none of these.
    """

    def __init__(self, name: str | None, device_type: str):
        if name is not None and name not in DTYPES:
            raise ValueError(f"Unknown precision '{name}'; choose 'bf16', 'fp16', or None for the model's precision.")
        self.dtype = None if name is None else DTYPES[name]
        self.device_type = device_type
        self.scale = 2.0**16 if name == "fp16" else 1.0

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The context for forward passes."""
        with torch.autocast(self.device_type, self.dtype) if self.dtype else nullcontext():
            with AttentionInFloat32() if self.device_type == "cpu" else nullcontext():
                yield

    def lower_scale(self) -> bool:
        """Lowers the loss scale after an overflow, if possible. Returns whether it did."""
        if self.scale <= 2.0**-8 or self.dtype != torch.float16:
            return False
        self.scale /= 4
        return True


def chosen_precision(name: str | None, accelerator: Accelerator | None) -> str | None:
    """A precision by name, or else that of an accelerator; `None` is the model's own."""
    if name is None and accelerator is not None:
        name = accelerator.mixed_precision
    return None if name == "no" else name


def validate_gradients() -> None:
    """Checks that gradients can be computed. Under `no_grad` they can, as what needs them switches them on.

    Raises:
        ValueError: If they cannot.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("Scores and tuned layers take gradients, which torch.inference_mode() excludes. Leave it.")


class AttentionInFloat32(TorchFunctionMode):
    """Computes fused attention of bfloat16 in float32.

    The backward pass of torch's fused attention for processors takes three to six times as long in bfloat16 as in
    float32, half of a whole pass over a small model.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query = args[0] if args else kwargs["query"]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        if dtype != torch.bfloat16 or query.dtype == torch.float64:  # Which autocast leaves as it is.
            return function(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            wide = {name: _in_float32(value) for name, value in (kwargs or {}).items()}
            return function(*map(_in_float32, args), **wide).to(dtype)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextmanager
def plain_forward(model: PreTrainedModel) -> Iterator[None]:
    """Takes off compiled forwards, and the one that accelerate puts on a model that it trains in low precision.

    Compiled code does not call hooks, and in a copy of the model it runs the original. Accelerate's forward copies
    logits and loss to float32 separately, so that the one no longer leads to the other. It is there only in a process
    that has trained, so results would depend on that.
    """
    forwards = {module: take_off_forward(module) for module in model.modules()}
    try:
        yield
    finally:
        for module, forward in forwards.items():
            if forward is not None:
                module.forward = forward
