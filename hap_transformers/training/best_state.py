"""Keeps the best weights of a recovery, so that it never ends worse than it began."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..files import whole_file


logger = logging.get_logger(__name__)

# The file of the best weights, beside the recovery's checkpoints.
BEST_STATE = "best_state.safetensors"
UNKNOWN_BEST = (
    "'{file}' with the best weights so far is missing or is not of this model. The recovery goes on from its "
    "checkpoint, and cannot return to weights from before it."
)


class BestState(TrainerCallback):
    """Measures a model before, during and after its training, and puts the best weights back at the end.

    Args:
        measure (`Callable`): Returns what shall be low, given the trainer's state. In several processes all get the
            same value.
        checks (`Callable`): Returns, given the number of steps, how often it is measured within them, at equal
            distances and at the end. For 0 it is measured before and after the training alone.
        folder (`Path`): Where the best weights are saved whenever a checkpoint is, for resumption.

    Attributes:
        before (`float`): The value before the first step.
        best (`float`): The lowest value.
        step (`int`): The step whose weights have it. At 0 these are the weights from before the training.
    """

    def __init__(self, measure: Callable[[TrainerState], float], checks: Callable[[int], int], folder: Path):
        self.measure, self.checks, self.file = measure, checks, folder / BEST_STATE
        self.before = self.best = math.inf
        self.step, self._measured, self._every = 0, -1, 0
        self._weights: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Takes the weights before the first step, or the best ones of the recovery that is resumed."""
        checks = self.checks(state.max_steps)
        self._every = math.ceil(state.max_steps / checks) if checks else 0
        if self._weights:  # `auto_find_batch_size` begins anew with smaller batches.
            self._put_back(model)
            self.step = 0
            return
        if state.global_step and self._load(model):
            return
        if state.global_step:
            logger.warning(UNKNOWN_BEST.format(file=self.file))
            if not self._every:  # What is measured then is the best checkpoint so far, not the weights of this one.
                return
        self.before = self._check(state, model)
        if args.save_strategy != "no" and state.is_world_process_zero:
            self._save()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Measures the model if it is time."""
        if self._every and state.global_step % self._every == 0:
            self._check(state, model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Saves the best weights so far beside the checkpoint."""
        if state.is_world_process_zero:
            self._save()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Puts the best weights into the model."""
        if self._measured != state.global_step or not self._every:
            self._check(state, model)
        if self.step != state.global_step:
            self._put_back(model)
        self._weights = {}

    def _put_back(self, model: nn.Module) -> None:
        with torch.no_grad():
            for name, tensor in _tensors(model).items():
                tensor.copy_(self._weights[name])

    def _check(self, state: TrainerState, model: nn.Module) -> float:
        """Measures the model, and takes its weights if they are the best."""
        value, self._measured = self.measure(state), state.global_step
        if not self._weights or value < self.best:  # A value that is not finite is never better.
            self.best, self.step = value, state.global_step
            plain = torch.contiguous_format  # Other layouts are not saved.
            self._weights = {
                name: tensor.detach().to("cpu", copy=True, memory_format=plain)
                for name, tensor in _tensors(model).items()
            }
        return value

    def _save(self) -> None:
        if not self._weights:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        values = {"before": self.before, "best": self.best, "step": self.step}
        with whole_file(self.file) as unfinished:
            save_file(self._weights, unfinished, {name: repr(value) for name, value in values.items()})

    def _load(self, model: nn.Module) -> bool:
        """Takes the saved weights, if they are this model's."""
        try:
            with safe_open(self.file, "pt") as saved:
                values: Mapping[str, str] = saved.metadata() or {}
                weights = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            before, best, step = float(values["before"]), float(values["best"]), int(values["step"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in _tensors(model).items()}:
            return False
        self.before, self.best, self.step, self._weights = before, best, step, weights
        return True


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: parameters with a gradient, and buffers such as running statistics."""
    trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | dict(model.named_buffers())
