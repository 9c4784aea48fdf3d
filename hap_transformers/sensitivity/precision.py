"""Low precision for scoring: autocast, and for fp16 a loss scale that is undone exactly."""

from contextlib import AbstractContextManager, nullcontext

import torch


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The precision that forward passes and products run in; what is summed up is summed in float32 or better.

    In fp16 gradients underflow unless the loss is multiplied by a large number first. That number is a power of two,
    so dividing by it afterwards changes no digit; it goes down when something overflows, and the batch is done again.

    Args:
        name (`str`, *optional*): `"bf16"`, `"fp16"`, or `None` for the model's own.
        device_type (`str`): The type of the device that autocast is for.

    Raises:
        ValueError: If `name` is something else.
    """

    def __init__(self, name: str | None, device_type: str):
        if name is not None and name not in DTYPES:
            raise ValueError(f"Unknown precision '{name}'; choose 'bf16', 'fp16', or None for the model's own.")
        self.dtype = None if name is None else DTYPES[name]
        self.device_type = device_type
        self.scale = 2.0**16 if name == "fp16" else 1.0

    def autocast(self) -> AbstractContextManager:
        """The context for forward passes."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)

    def lower_scale(self) -> bool:
        """Lowers the loss scale after an overflow, if there is room; says whether it did."""
        if self.scale <= 2.0**-8 or self.dtype != torch.float16:
            return False
        self.scale /= 4
        return True
