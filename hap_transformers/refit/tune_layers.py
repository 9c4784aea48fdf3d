"""Trains every layer of a pruned model for itself to give what the dense model's layer gives: no labels."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..components.forwards import eager_model, validate_forwards
from ..components.groups import find_groups, kinds_in_use
from ..components.slicing import validate_sliceable
from ..memory import memory_limit
from ..sensitivity.precision import plain_forward
from ..surgery.undo import values_undone
from ..tokens import valid_tokens
from .dense_copy import own_refitted
from .kept_values import KeptValues, default_limit
from .layer_runs import ForwardFunction, LayerRuns, shares_layers
from .reconstruct import keep_share, sites_to_refit, written


# The learning rate rises over this many steps, and then falls to 0.
WARMUP = 20
# One batch in so many is not trained on: it tells whether a layer got better.
HELD_OUT_EVERY = 10

Loss = Callable[[int, bool], torch.Tensor]


def tune_layers(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    epochs: int = 3,
    learning_rate: float = 1e-3,
    forward: ForwardFunction | None = None,
    progress: bool = True,
    max_memory: int | str | None = None,
) -> None:
    """Trains the layers of a pruned model, one after the other, towards the outputs of the dense model's layers.

    A layer reads what the tuned layers before it give. Its loss is the mean squared distance of its output from that
    of the dense model's layer on the dense model's inputs, over the tokens that are no padding. The weights that
    [`reconstruct`] refits are trained by Adam, those of earlier layers rest, and no gradient passes through more than
    one layer. [`reconstruct`] finds the best linear maps first; this also adapts what lies before nonlinearities.

    One batch in ten is held out where there are ten. A layer that has not come nearer to the dense model on them, or
    without them on all, gets its weights back.

    Args:
        model (`PreTrainedModel`): The pruned model; changed in place.
        dense (`PreTrainedModel`): The model it was pruned from, on the same device; only read. It may share parameters
            with the pruned one.
        batches (`Iterable[Mapping[str, Any]]`): Inputs; labels are not needed.
        epochs (`int`, *optional*, defaults to 3): How often a layer sees each batch.
        learning_rate (`float`, *optional*, defaults to 1e-3): The highest one.
        forward (`Callable`, *optional*): As for [`reconstruct`].
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        max_memory (`int` or `str`, *optional*): As for [`reconstruct`].

    Raises:
        ValueError: If `epochs` or the learning rate is not positive, there are no batches, layers share weights,
            weights are of lower precision than float32, or the models do not fit each other; the model is then as it
            was.
    """
    if epochs < 1 or not learning_rate > 0:
        raise ValueError(f"`epochs` and `learning_rate` must be positive, got {epochs} and {learning_rate}.")
    model, dense = eager_model(model), eager_model(dense)
    validate_forwards(model)
    validate_forwards(dense)
    with KeptValues(memory_limit(max_memory) or default_limit(model.device)) as kept:
        tuned = LayerRuns(model, kept, forward)
        original = LayerRuns(dense, kept, forward, kinds_in_use(model))
        sites = sites_to_refit(tuned, original)
        validate_sliceable(model, sites)
        validate_tunable(model)
        own_refitted(sites, original.groups[len(original.groups) - len(sites) :])
        count = keep_share(batches, kept, None)
        if not count:
            raise ValueError("There are no batches to tune layers on.")
        first = sites[0].block if sites else len(tuned.layers)
        steps = range(first, len(tuned.layers))
        with plain_forward(model), plain_forward(dense), values_undone(written(sites)), _frozen(model):
            for layer in tqdm(steps, desc="Tuning layers", disable=None if progress else True):

                def loss(position: int, graph: bool, layer: int = layer) -> torch.Tensor:
                    inputs = send_to_device(kept["batch", position], model.device)
                    found = tuned.output(position, inputs, layer, graph)
                    mask = inputs.get("attention_mask")
                    target = valid_tokens(kept["targets", position], mask)
                    return (valid_tokens(found, mask) - target).square().mean() / target.square().mean()

                for position in range(count):
                    inputs = send_to_device(kept["batch", position], model.device)
                    kept["targets", position] = original.output(position, inputs, layer)
                parameters = written([site for site in sites if site.block == layer])
                trained = [p for p in parameters if isinstance(p, nn.Parameter) and p.numel()]  # No statistics.
                _tune(trained, loss, count, epochs, learning_rate)


def validate_tunable(model: PreTrainedModel) -> None:
    """Refuses models whose layers cannot be trained for themselves.

    Raises:
        ValueError: If layers share weights, or weights are of lower precision than float32.
    """
    name = type(model).__name__
    if shares_layers(model):
        raise ValueError(f"Layers of {name} share their weights and cannot be tuned one by one. Do without tuning.")
    tuned = written([group for group in find_groups(model) if group.readers])
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in tuned):
        raise ValueError(f"The weights of {name} are too coarse for small steps. Load it in float32 to tune layers.")


def _tune(parameters: Sequence[torch.Tensor], loss: Loss, count: int, epochs: int, learning_rate: float) -> None:
    """Trains one layer, and puts its weights back if the batches that are held out tell no gain."""
    held_out = [place for place in range(count) if place % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
    trained = [place for place in range(count) if place not in held_out]
    judged = held_out or trained
    if not parameters:
        return
    before, weights = _mean(loss, judged), [parameter.detach().clone() for parameter in parameters]
    total, generator = epochs * len(trained), torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, learning_rate)
    order = (trained[i] for _ in range(epochs) for i in torch.randperm(len(trained), generator=generator).tolist())
    for step, place in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / WARMUP, 1.0) * (1 - step / total)
        optimizer.zero_grad()
        loss(place, True).backward()
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    if not _mean(loss, judged) < before:
        with torch.no_grad():
            for parameter, values in zip(parameters, weights, strict=True):
                parameter.copy_(values)


def _mean(loss: Loss, places: Sequence[int]) -> float:
    return sum(loss(place, False).item() for place in places) / len(places)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Lets no parameter of a model require a gradient, and restores which did."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, value in required.items():
            parameter.requires_grad_(value)
            parameter.grad = None
