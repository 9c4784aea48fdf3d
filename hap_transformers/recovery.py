"""What is different when a pruned model trains."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from .config import HapConfig
from .distillation import distillation_loss, hidden_loss, hidden_states
from .resuming import RECOVERY


@contextmanager
def recovery_arguments(args: TrainingArguments, config: HapConfig) -> Iterator[None]:
    """Puts the recovery's settings, and its own folder for checkpoints, in the place of the training arguments'.

    In the folder of the dense model's checkpoints, one of the same number of steps would be overwritten, and
    `save_total_limit` would take the dense ones away.

    Args:
        args (`TrainingArguments`): Changed until the context ends.
        config (`HapConfig`): Has the recovery's settings.
    """
    recovery = {
        "num_train_epochs": config.recovery_epochs,
        # Else steps that fine-tuning was to take would override the epochs.
        "max_steps": None if config.recovery_epochs is None else -1,
        "learning_rate": config.recovery_learning_rate,
        "output_dir": os.path.join(str(args.output_dir), RECOVERY),
    }
    recovery = {name: value for name, value in recovery.items() if value is not None}
    original = {name: getattr(args, name) for name in recovery}
    for name, value in recovery.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in original.items():
            setattr(args, name, value)


def with_distillation(
    loss: torch.Tensor,
    outputs: Mapping[str, Any],
    targets: Mapping[str, Any],
    labels: torch.Tensor | None,
    mask: torch.Tensor | None,
    model: PreTrainedModel,
    config: HapConfig,
) -> torch.Tensor:
    """Adds to the loss of the labels what draws a pruned model to the dense one, by `config`'s weights.

    Args:
        loss (`torch.Tensor`): The mean loss of the labels.
        outputs (`Mapping[str, Any]`): Those of the pruned model.
        targets (`Mapping[str, Any]`): Those of the dense model.
        labels (`torch.Tensor`, *optional*): The batch's labels.
        mask (`torch.Tensor`, *optional*): Its attention mask.
        model (`PreTrainedModel`): The pruned model, unwrapped.
        config (`HapConfig`): The weights.
    """
    distilled = distillation_loss(
        outputs,
        targets,
        config.distillation_temperature,
        problem_type=model.config.problem_type,
        labels=labels,
        shifted=model.can_generate() and not model.config.is_encoder_decoder,
    )
    loss = (1 - config.distillation) * loss + config.distillation * distilled
    if config.distillation_hidden:
        states = (hidden_states(outputs), hidden_states(targets))
        loss = loss + config.distillation_hidden * hidden_loss(*states, mask)
    return loss
