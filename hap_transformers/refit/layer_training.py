"""Trains the weights of one layer, on the batches of all processes."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import nn


# The learning rate rises over this many steps, and then falls to 0.
WARMUP = 20
# One batch in so many is not trained on: it tells whether a layer got better.
HELD_OUT_EVERY = 10

# Takes the position of a batch, and whether gradients shall lead to the weights.
Loss = Callable[[int, bool], torch.Tensor]


def train_layer(
    layer: nn.Module,
    name: str,
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    counts: Sequence[int],
    epochs: int,
    learning_rate: float,
    accelerator: Accelerator | None = None,
) -> None:
    """Trains one layer by Adam, and puts its weights back if the batches that are held out tell no gain.

    Args:
        layer (`nn.Module`): The layer.
        name (`str`): What errors call it.
        parameters (`Sequence[nn.Parameter]`): Those of its weights that are trained; all others are frozen.
        loss (`Callable`): Takes the position of a batch of this process, and whether gradients are needed.
        counts (`Sequence[int]`): How many batches each process has.
        epochs (`int`): How often the layer sees each batch.
        learning_rate (`float`): The highest one.
        accelerator (`Accelerator`, *optional*): The processes. A step takes a batch of each, if all have one left.

    Raises:
        ValueError: If the loss is not finite before the layer is trained.
    """
    if not parameters:
        return
    own = counts[0 if accelerator is None else accelerator.process_index]
    holds_out = min(counts) >= HELD_OUT_EVERY
    trained, held_out = list[int](), list[int]()
    for place in range(own):
        (held_out if holds_out and place % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else trained).append(place)
    longest = max(counts) - (max(counts) // HELD_OUT_EVERY if holds_out else 0)
    weights = [parameter.detach().clone() for parameter in parameters]
    with _in_float32(layer):
        before = _mean(loss, held_out or trained, accelerator, parameters[0].device)
        if not math.isfinite(before):
            raise ValueError(
                f"The output of {name} is {before} away from the dense model's, so the layer cannot be tuned. Check "
                "the dense model's weights and the batches, or do without tuning (tuning_epochs=0)."
            )
        _adam(parameters, loss, _order(trained, longest, epochs), epochs * longest, learning_rate, accelerator)
        with torch.no_grad():
            for parameter, values in zip(parameters, weights, strict=True):
                parameter.copy_(parameter.to(values.dtype))  # Judged as they are kept.
        better = _mean(loss, held_out or trained, accelerator, parameters[0].device) < before
    if not better:
        with torch.no_grad():
            for parameter, values in zip(parameters, weights, strict=True):
                parameter.copy_(values)


def _order(trained: Sequence[int], longest: int, epochs: int) -> Iterator[int | None]:
    """Positions of batches step by step; `None` where other processes have more than this one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        yield from (trained[i] for i in torch.randperm(len(trained), generator=generator).tolist())
        yield from [None] * (longest - len(trained))


def _adam(
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    order: Iterator[int | None],
    total: int,
    learning_rate: float,
    accelerator: Accelerator | None,
) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, learning_rate)
    for step, place in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / WARMUP, 1.0) * (1 - step / total)
        optimizer.zero_grad()
        if place is not None:
            with torch.enable_grad():
                loss(place, True).backward()
        if accelerator is not None and accelerator.num_processes > 1:
            _average_gradients(parameters, place is not None, accelerator)
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def _average_gradients(parameters: Sequence[nn.Parameter], has_batch: bool, accelerator: Accelerator) -> None:
    """Gives every process the mean gradient of those that have a batch."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_tensor([float(has_batch)])])
    summed = accelerator.reduce(flat, "sum")
    parts = (summed[:-1] / summed[-1]).split([gradient.numel() for gradient in gradients])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def _mean(loss: Loss, places: Sequence[int], accelerator: Accelerator | None, device: torch.device) -> float:
    """The mean loss over some batches of all processes."""
    sums = [sum((loss(place, False).item() for place in places), 0.0), float(len(places))]
    if accelerator is not None:
        sums = accelerator.reduce(torch.tensor(sums, device=device), "sum").tolist()
    return sums[0] / sums[1]


@contextmanager
def _in_float32(layer: nn.Module) -> Iterator[None]:
    """Lets a layer of lower precision work in float32, and rounds its weights afterwards: small steps need it."""
    tensors = [*layer.parameters(), *layer.buffers()]
    coarse = {tensor: tensor.dtype for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)}

    def widen(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return convert_to_fp32(args), convert_to_fp32(kwargs)

    handle = layer.register_forward_pre_hook(widen, with_kwargs=True) if coarse else None
    for tensor in coarse:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in coarse.items():
            tensor.data = tensor.data.to(dtype)
        if handle is not None:
            handle.remove()
