"""Low precision for scoring: autocast and, for fp16, a loss scale that is undone exactly."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from ..components.groups import take_off_forward


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

    def autocast(self) -> AbstractContextManager:
        """Returns the context for forward passes."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)

    def lower_scale(self) -> bool:
        """Lowers the loss scale after an overflow, if possible. Returns whether it did."""
        if self.scale <= 2.0**-8 or self.dtype != torch.float16:
            return False
        self.scale /= 4
        return True


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
