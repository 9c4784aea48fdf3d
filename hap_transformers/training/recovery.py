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


NO_TEACHER = (
    "There is no dense model to distil from, as this HapTrainer has not pruned its model itself; it trains on the "
    "labels alone. Pass teacher=... to distil, or set distillation=0."
)
NOT_DISTILLED = (
    "{name}.compute_loss does not call HapTrainer's, which distils from the dense model: the pruned model trains on "
    "the labels alone. Call super().compute_loss(...), pass compute_loss_func in its place, or set distillation=0."
)

OPTIMIZER_DROPPED = (
    "The optimizer passed to HapTrainer holds weights that were removed, and is dropped; the next train() makes one "
    "from the training arguments. Pass optimizer_cls_and_kwargs to keep your choice."
)


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
    problem_type = model.config.problem_type
    if problem_type is None and labels is not None and labels.is_floating_point() and labels.ndim > 1:
        # As the model's own loss would take them; with another loss it is never asked.
        problem_type = "multi_label_classification" if labels.shape[-1] > 1 else "regression"
    distilled = distillation_loss(
        outputs,
        targets,
        config.distillation_temperature,
        problem_type=problem_type,
        labels=labels,
        shifted=model.can_generate() and not model.config.is_encoder_decoder,
    )
    loss = (1 - config.distillation) * loss + config.distillation * distilled
    if config.distillation_hidden:
        states = (hidden_states(outputs), hidden_states(targets))
        loss = loss + config.distillation_hidden * hidden_loss(*states, mask)
    return loss
