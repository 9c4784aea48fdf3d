"""What is special about trainers of TRL.

The forward of `SFTTrainer` makes no logits, and its batches have labels. `RewardTrainer` compares pairs of rows. Other
trainers are refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..sensitivity.batches import counts, shifts_labels
from ..sensitivity.methods import get_method, methods_without
from ..tokens import IGNORED
from .config import HapConfig
from .distillation import distillation_loss, hidden_distance
from .hooks import ComputeLoss, TrainerHooks, register_hooks


class SFTHooks(TrainerHooks):
    """Hooks of `SFTTrainer`.

    While it trains, its own `compute_loss` computes the loss and logs its metrics; distillation computes the logits of
    the counted tokens from the hidden states of that call. Components are scored by the logits of the whole model:
    by `compute_loss_func`, label smoothing, or the cross-entropy of the next tokens, also for `loss_type="dft"`.
    """

    package = "trl"

    def loss_to_score(
        self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Returns the loss that `Trainer` would compute, without the metrics that `SFTTrainer` logs."""
        return Trainer.compute_loss(self.trainer, model, {**inputs, "use_cache": False}, return_outputs)

    def recovery_loss(
        self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Adds the distance of the next tokens' logits to the loss of `SFTTrainer`."""
        config, student, teacher = self.config, self.student, self.trainer.teacher
        given = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        if config.distillation_hidden:
            inputs, given = ({**entries, "output_hidden_states": True} for entries in (inputs, given))
        counted = inputs["labels"][:, 1:] != IGNORED
        labelled = counts(inputs, shifts_labels(student))
        with _called(student.base_model) as calls:
            loss = compute_loss(model, dict(inputs))
        # Other calls are for metrics only. Compiled code may not tell of any.
        seen = [call for call in calls if call.last_hidden_state.requires_grad]
        with self.trainer.accelerator.autocast():
            outputs = seen[0] if seen else student.base_model(**given)
            with torch.no_grad():
                targets = teacher.base_model(**given)
                wanted = _logits(teacher, targets, counted)
            found = _logits(student, outputs, counted)
        distilled = distillation_loss(found, wanted, config.distillation_temperature)
        total = (1 - config.distillation) * (loss if labelled else torch.zeros_like(loss))
        total = total + config.distillation * distilled
        if config.distillation_hidden:
            total = total + config.distillation_hidden * hidden_distance(outputs, targets, inputs)
        return total, outputs

    def distance_to_dense(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Measures without the metrics that `SFTTrainer` logs."""
        teacher, counted = self.trainer.teacher, inputs["labels"][:, 1:] != IGNORED
        given = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        found, wanted = (_logits(m, m.base_model(**given), counted) for m in (self.student, teacher))
        return distillation_loss(found, wanted, 1.0)

    def label_loss(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Measures without the metrics that `SFTTrainer` logs."""
        loss: torch.Tensor = self.loss_to_score(compute_loss, model, inputs)  # type: ignore[assignment]
        return loss


@contextmanager
def _called(module: nn.Module) -> Iterator[list[Any]]:
    """Collects what a module returns."""
    calls: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, outputs: calls.append(outputs))
    try:
        yield calls
    finally:
        handle.remove()


def _logits(model: PreTrainedModel, outputs: Any, counted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of the next tokens that count, shape `(counted tokens, vocabulary)`."""
    return {"logits": model.get_output_embeddings()(outputs.last_hidden_state[:, :-1][counted])}


class RewardHooks(TrainerHooks):
    """Hooks of `RewardTrainer`, whose loss compares the two rows of a pair."""

    def validate(self, config: HapConfig) -> None:
        """Refuses methods that need a loss of each row.

        Raises:
            ValueError: If the method needs the curvature in the logits.
        """
        if get_method(config.method).curvature == "logits":
            raise ValueError(
                f"{type(self.trainer).__name__} is a RewardTrainer, whose loss compares pairs of examples, so "
                f"method='{config.method}' cannot score it. Use one of {methods_without('logits')}."
            )


class RefusedHooks(TrainerHooks):
    """Refuses trainers of TRL whose loss compares answers or generates them, and which replace the model's forward."""

    package = "trl"

    def validate(self, config: HapConfig) -> None:
        """Refuses all settings.

        Raises:
            ValueError: Always.
        """
        bases = type(self.trainer).__mro__
        refused = next(base.__name__ for base in bases if base.__module__.partition(".")[0] == self.package)
        raise ValueError(
            f"{type(self.trainer).__name__} is a {refused}, which does not call the model once on a batch of its "
            "inputs. So its model cannot be scored, refitted or recovered. Prune with HapTrainer or SFTTrainer, and "
            f"give the pruned model to {refused} (without hap_config)."
        )


register_hooks("trl", "SFTTrainer", SFTHooks)
register_hooks("trl", "RewardTrainer", RewardHooks)
# Releases of TRL differ in whether its trainers have a class in common.
for name in ("_BaseTrainer", "DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer"):
    register_hooks("trl", name, RefusedHooks)
