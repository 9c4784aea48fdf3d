"""Trains every layer of a pruned model for itself to give what the dense model's layer gives: no labels."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..components.forwards import eager_model, validate_forwards
from ..components.groups import kinds_in_use
from ..components.slicing import validate_writable
from ..memory import memory_limit
from ..sensitivity.precision import plain_forward, validate_gradients
from ..surgery.undo import values_undone
from ..tokens import mask_of, relative_distance, valid_tokens
from .dense_copy import own_refitted
from .emptied_layers import ends_of_emptied
from .kept_values import KeptValues, default_limit
from .layer_runs import ForwardFunction, LayerRuns, precision_of_runs, shares_layers
from .layer_training import train_layer
from .reconstruct import keep_share, sites_to_refit, written


EPOCHS = 3


def tune_layers(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    epochs: int = EPOCHS,
    learning_rate: float = 1e-3,
    forward: ForwardFunction | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
    max_memory: int | str | None = None,
    precision: str | None = None,
) -> None:
    """Trains the layers of a pruned model, one after the other, towards the outputs of the dense model's layers.

    A layer reads what the tuned layers before it give. Its loss is the mean squared distance of its output from that
    of the dense model's layer on the dense model's inputs, over the tokens that are no padding. The weights that
    [`reconstruct`] refits are trained by Adam, those of earlier layers rest, and no gradient passes through more than
    one layer. [`reconstruct`] finds the best linear maps first; this also adapts what lies before nonlinearities.

    One batch in ten is held out where there are ten. A layer that has not come nearer to the dense model on them, or
    without them on all, gets its weights back. Layers in half precision are trained in float32.

    Args:
        model (`PreTrainedModel`): The pruned model; changed in place.
        dense (`PreTrainedModel`): The model it was pruned from, on the same device; only read. It may share parameters
            with the pruned one.
        batches (`Iterable[Mapping[str, Any]]`): Inputs; labels are not needed.
        epochs (`int`, *optional*, defaults to 3): How often a layer sees each batch.
        learning_rate (`float`, *optional*, defaults to 1e-3): The highest one.
        forward (`Callable`, *optional*): As for [`reconstruct`].
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        accelerator (`Accelerator`, *optional*): Shares the batches out between its processes, as for [`reconstruct`].
            A step then takes a batch of every process.
        max_memory (`int` or `str`, *optional*): As for [`reconstruct`].
        precision (`str`, *optional*): As for [`reconstruct`]; weights and steps are in float32.

    Raises:
        ValueError: If gradients cannot be computed, `epochs` or the learning rate is not positive, there are no
            batches, layers share weights, outputs are not finite, or the models do not fit each other; the model is
            then as it was.
    """
    if epochs < 1 or not learning_rate > 0:
        raise ValueError(f"`epochs` and `learning_rate` must be positive, got {epochs} and {learning_rate}.")
    validate_gradients()
    model, dense = eager_model(model), eager_model(dense)
    validate_forwards(model)
    validate_forwards(dense)
    precise = precision_of_runs(precision, accelerator, model)
    with KeptValues(memory_limit(max_memory) or default_limit(model.device)) as kept:
        tuned = LayerRuns(model, kept, forward, precision=precise)
        original = LayerRuns(dense, kept, forward, kinds_in_use(model), precise)
        sites = sites_to_refit(tuned, original)
        validate_writable(model, sites)
        validate_tunable(model)
        own_refitted(sites, original.groups[len(original.groups) - len(sites) :])
        counts = _counts(keep_share(batches, kept, accelerator), accelerator)
        if not any(counts):
            raise ValueError("There are no batches to tune layers on.")
        own = counts[accelerator.process_index if accelerator else 0]
        first = sites[0].block if sites else len(tuned.layers)
        ends = ends_of_emptied(tuned, original)
        made_up_for = {layer for front, last in ends.items() for layer in range(front + 1, last + 1)}
        steps = [layer for layer in range(first, len(tuned.layers)) if layer not in made_up_for]
        with plain_forward(model), plain_forward(dense), values_undone(written(sites)), _frozen(model):
            for layer in tqdm(steps, desc="Tuning layers", disable=None if progress else True):

                def loss(position: int, graph: bool, layer: int = layer) -> torch.Tensor:
                    inputs = send_to_device(kept["batch", position], model.device)
                    found = tuned.output(position, inputs, layer, graph)
                    mask = mask_of(inputs, tuned.is_decoder(layer))
                    target = valid_tokens(kept["targets", position], mask).to(found.dtype)
                    return relative_distance(valid_tokens(found, mask), target)

                for position in range(own):
                    inputs = send_to_device(kept["batch", position], model.device)
                    kept["targets", position] = original.output(position, inputs, ends.get(layer, layer))
                parameters = written([site for site in sites if site.block == layer])
                trained = [p for p in parameters if isinstance(p, nn.Parameter) and p.numel()]  # No statistics.
                name = f"layer {layer} of {type(model).__name__}"
                train_layer(tuned.layers[layer], name, trained, loss, counts, epochs, learning_rate, accelerator)


def epochs_to_tune(epochs: int | None, refit: bool, model: PreTrainedModel) -> int:
    """How often layers see each batch if that was not said: not at all without a refit, or where they share weights.

    Args:
        epochs (`int`, *optional*): What was said.
        refit (`bool`): Whether there is a refit.
        model (`PreTrainedModel`): The model.

    Raises:
        ValueError: If layers shall be tuned that share weights.
    """
    if epochs is None:
        return 0 if not refit or shares_layers(model) else EPOCHS
    if epochs:
        validate_tunable(model)
    return epochs


def validate_tunable(model: PreTrainedModel) -> None:
    """Refuses models whose layers cannot be trained for themselves.

    Raises:
        ValueError: If layers share weights.
    """
    if shares_layers(model):
        raise ValueError(
            f"Layers of {type(model).__name__} share their weights and cannot be tuned one by one. Do without tuning."
        )


def _counts(own: int, accelerator: Accelerator | None) -> list[int]:
    """How many batches each process has."""
    if accelerator is None:
        return [own]
    return accelerator.gather(torch.tensor([own], device=accelerator.device)).tolist()


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
