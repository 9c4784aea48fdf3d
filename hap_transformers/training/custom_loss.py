"""Reproduces how `Trainer` computes losses, including custom ones."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer


def counting_items(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps a `compute_loss_func` so that it counts the labels of the batch if no number of labels is passed.

    `Trainer` passes the number of labels of all accumulated batches, but only while it trains or evaluates. Scoring,
    refit and distillation need the loss of a single batch. Labels of -100 do not count, as in `Trainer`.
    """

    @functools.wraps(function)
    def counted(outputs: Any, labels: Any, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        if num_items_in_batch is None and isinstance(labels, torch.Tensor):
            num_items_in_batch = (labels != -100).sum()
        return function(outputs, labels, num_items_in_batch=num_items_in_batch)

    return counted


def name_of_loss(trainer: Trainer) -> str:
    """The function that computes a trainer's loss, as users know it: their own, or the model's."""
    own = trainer.compute_loss if not trainer.compute_loss.__module__.startswith("hap_transformers.") else None
    function = own or trainer.compute_loss_func or trainer.accelerator.unwrap_model(trainer.model).forward
    return getattr(function, "__qualname__", type(function).__name__)


def model_inputs(trainer: Trainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs that `Trainer` passes to the model: without labels if a loss outside the model uses them."""
    withheld = trainer.compute_loss_func is not None or trainer.label_smoother is not None
    return {name: value for name, value in inputs.items() if not (withheld and name == "labels")}


def averages_over_batches(trainer: Trainer, num_items_in_batch: torch.Tensor | int | None) -> bool:
    """Whether `Trainer` divides a loss by the number of accumulated batches.

    It does not if the loss is already divided by the number of items in all accumulated batches.
    """
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)  # A subclass may declare this.
    if declared is not None:
        return not declared
    by_model = num_items_in_batch is not None and trainer.model_accepts_loss_kwargs
    return not (by_model or trainer.compute_loss_func is not None)
