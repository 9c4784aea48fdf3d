"""Keeps the best weights of a recovery, so that it never ends worse than it began."""

import math
from collections.abc import Callable, Iterable, Mapping
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
    "'{file}' with the best weights so far is missing, is not of this model, or was chosen by another metric. The "
    "recovery goes on from its checkpoint, and cannot return to weights from before it."
)
JUDGED_ANEW = (
    "The best weights so far were those by {earlier}. This run judges by {goal}, and judges them and those of the "
    "checkpoint anew."
)


class BestState(TrainerCallback):
    """Measures a model before, during and after its training, and puts the best weights back at the end.

    Args:
        measure (`Callable`): Returns what shall be low, given the trainer's state. In several processes all get the
            same value.
        checks (`Callable`): Returns, given the number of steps, how often it is measured within them, at equal
            distances and at the end. For 0 it is measured before and after the training alone.
        folder (`Path`): Where the best weights are saved whenever a checkpoint is, for resumption.
        goal (`str`): What is measured, in words. Values of a run that measured something else do not compare.
        aside (`Callable`, *optional*): Returns another value, which is told where the training is undone.

    Attributes:
        before (`float`): The value before the first step, NaN if it was measured by another goal.
        best (`float`): The lowest value, which is not finite if none was.
        step (`int`): The step whose weights have it. At 0 these are the weights from before the training, or
            `of_earlier_attempt`.
        aside_values (`tuple[float, float]`, *optional*): Where the training is undone, the other value before it, and
            after it.
    """

    def __init__(
        self,
        measure: Callable[[TrainerState], float],
        checks: Callable[[int], int],
        folder: Path,
        goal: str,
        aside: Callable[[], float] | None = None,
    ):
        self.measure, self.checks, self.file, self.goal, self.aside = measure, checks, folder / BEST_STATE, goal, aside
        self.before = self.best = math.inf
        self.aside_values: tuple[float, float] | None = None
        self.step, self._measured, self._every = 0, -1, 0
        self._weights: dict[str, torch.Tensor] = {}

    @property
    def of_earlier_attempt(self) -> bool:
        """Whether the best weights were trained with larger batches, until memory was short."""
        return self.step == 0 and self.best < self.before

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
        if state.global_step and self._load(state, model):
            return
        if state.global_step:
            logger.warning(UNKNOWN_BEST.format(file=self.file))
            if not self._every:  # What is measured then is the best checkpoint so far, not the weights of this one.
                return
        self.before = self._check(state, model)
        if args.save_strategy != "no" and state.is_world_process_zero:
            self._save()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Takes weights that a callback has unfrozen, before they change for the first time."""
        if self._weights:
            self._weights |= _copies(model, _changing(model) - self._weights.keys())

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
        if not math.isfinite(self.best):
            self.step = state.global_step
        elif self.step != state.global_step:
            aside = None if self.step or self.of_earlier_attempt else self.aside
            after = aside() if aside else math.nan
            self._put_back(model)
            self.aside_values = (aside(), after) if aside else None
        self._weights = {}

    def _put_back(self, model: nn.Module) -> None:
        tensors = _tensors(model)
        with torch.no_grad():
            for name, tensor in self._weights.items():
                tensors[name].copy_(tensor)

    def _check(self, state: TrainerState, model: nn.Module) -> float:
        """Measures the model, and takes its weights if they are the best."""
        value, self._measured = self.measure(state), state.global_step
        # A value that is not finite is never better, and any is better than it.
        if not self._weights or value < self.best or (math.isfinite(value) and not math.isfinite(self.best)):
            self.best, self.step = value, state.global_step
            # Weights that a callback has frozen meanwhile go back to those of the same step.
            self._weights = _copies(model, _changing(model) | self._weights.keys())
        return value

    def _save(self) -> None:
        if not self._weights:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        values = {"before": repr(self.before), "best": repr(self.best), "step": repr(self.step), "goal": self.goal}
        with whole_file(self.file) as unfinished:
            save_file(self._weights, unfinished, values)

    def _load(self, state: TrainerState, model: nn.Module) -> bool:
        """Takes the saved weights, if they are this model's, and judges them anew if something else was measured."""
        try:
            with safe_open(self.file, "pt") as saved:
                values: Mapping[str, str] = saved.metadata() or {}
                weights = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            before, best, step = float(values["before"]), float(values["best"]), int(values["step"])
            earlier = values["goal"]
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        shapes = {name: tensor.shape for name, tensor in _tensors(model).items()}
        if not _changing(model) <= weights.keys() or any(shapes.get(n) != t.shape for n, t in weights.items()):
            return False
        if earlier != self.goal and not self._every:  # What is measured then is not the weights in the model.
            return False
        self.before, self.best, self.step, self._weights = before, best, step, weights
        if earlier != self.goal:
            logger.warning(JUDGED_ANEW.format(earlier=earlier, goal=self.goal))
            self._judge_anew(state, model)
        return True

    def _judge_anew(self, state: TrainerState, model: nn.Module) -> None:
        """Measures the weights that were the best, then those in the model, and takes the better ones."""
        best, checkpoint = self._weights, _copies(model, self._weights.keys())
        self._put_back(model)
        self.best = self.measure(state)
        self.before = self.best if self.step == 0 else math.nan
        self._weights = checkpoint
        self._put_back(model)
        self._weights = best
        self._check(state, model)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, and buffers such as running statistics."""
    return {name: parameter.data for name, parameter in model.named_parameters()} | dict(model.named_buffers())


def _changing(model: nn.Module) -> set[str]:
    """Names of what training changes now: parameters with a gradient, and buffers."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name for name, _ in model.named_buffers()}


def _copies(model: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Copies of some tensors in memory, in a layout that files have."""
    wanted, plain = set(names), torch.contiguous_format
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=plain)
        for name, tensor in _tensors(model).items()
        if name in wanted
    }
