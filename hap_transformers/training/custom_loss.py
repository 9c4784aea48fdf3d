"""How `Trainer` computes losses, those of its user's own among them."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer


def counting_items(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Makes a `compute_loss_func` count the labels itself where it is not told their number.

    `Trainer` counts those of all batches that are accumulated, and only while it trains or evaluates; scoring, refits
    and distillation need the loss of a single batch. As there, labels of -100 do not count.
    """

    def counted(outputs: Any, labels: Any, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        if num_items_in_batch is None and isinstance(labels, torch.Tensor):
            num_items_in_batch = (labels != -100).sum()
        return function(outputs, labels, num_items_in_batch=num_items_in_batch)

    return counted


def model_inputs(trainer: Trainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """What `Trainer` gives the model of a batch: not the labels, where another loss than the model's takes them."""
    withheld = trainer.compute_loss_func is not None or trainer.label_smoother is not None
    return {name: value for name, value in inputs.items() if not (withheld and name == "labels")}


def averages_over_batches(trainer: Trainer, num_items_in_batch: torch.Tensor | int | None) -> bool:
    """Whether `Trainer` divides a loss by the number of accumulated batches: unless it sums over the items of all."""
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)  # What a subclass may say of its loss.
    if declared is not None:
        return not declared
    by_model = num_items_in_batch is not None and trainer.model_accepts_loss_kwargs
    return not (by_model or trainer.compute_loss_func is not None)
