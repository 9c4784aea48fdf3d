"""Training of a pruned model: its arguments and its loss."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ..sensitivity.batches import shifts_labels
from ..sensitivity.outputs import logits_of, named_tensors
from ..sensitivity.self_loss import SelfLoss, named_logits
from ..tokens import mask_of
from .config import HapConfig
from .distillation import distillation_loss, embedding_loss, hidden_distance
from .resuming import RECOVERY


logger = logging.get_logger(__name__)

NO_TEACHER = (
    "This HapTrainer has no dense model to distil from, because it did not prune its model itself. It trains on the "
    "labels alone. Pass teacher=... to distil, or set distillation=0."
)
NOT_DISTILLED = (
    "{name}.compute_loss does not call HapTrainer.compute_loss, which distils from the dense model. The pruned model "
    "trains on the labels alone. Call super().compute_loss(...), pass compute_loss_func, or set distillation=0."
)

GRADUALLY = (
    "whose optimizer holds the weights that pruning removes. To prune gradually, alternate: trainer.train(), "
    "trainer.prune(), trainer.train(), ..., with a rising trainer.hap_config.ratio."
)
SEARCHED = (
    "hyperparameter_search() keeps none of its models, so prune() prunes a new one of model_init. Set the best "
    "parameters in trainer.args and call train() before prune()."
)
OPTIMIZER_DROPPED = (
    "The optimizer passed to HapTrainer holds removed weights and is dropped. The next train() makes a new optimizer "
    "from the training arguments. Pass optimizer_cls_and_kwargs to keep your choice."
)


def no_labels(model: PreTrainedModel, config: HapConfig) -> str:
    """Says what to do where there are no labels, and their loss has a weight."""
    return (
        f"The training examples of this {type(model).__name__} have no labels, of whose loss recovery takes the share "
        f"1 - distillation = {1 - config.distillation:g}. Set distillation=1.0 to train on the dense model's outputs "
        "alone, or give labels."
    )


def warn_of_dora(model: nn.Module) -> None:
    """Warns of DoRA on emptied projections, which divides by the norm of their weights and gives NaN."""
    layers = {path: module for path, module in model.named_modules() if getattr(module, "lora_magnitude_vector", None)}
    emptied = [path for path, layer in layers.items() if not layer.base_layer.weight.numel()]
    if emptied:
        logger.warning(
            f"DoRA is on '{emptied[0]}', which pruning has emptied, and gives NaN there. Leave such modules out: "
            "LoraConfig(..., exclude_modules=hap_transformers.emptied_modules(model))."
        )


@contextmanager
def recovery_arguments(args: TrainingArguments, config: HapConfig) -> Iterator[None]:
    """Replaces training arguments by the recovery's settings and a separate folder for its checkpoints.

    In the folder of the dense model's checkpoints, the recovery would overwrite a checkpoint of the same number of
    steps, and `save_total_limit` would delete dense checkpoints.

    Args:
        args (`TrainingArguments`): The arguments; they are changed until the context ends.
        config (`HapConfig`): The recovery's settings.
    """
    recovery = {
        "num_train_epochs": config.recovery_epochs,
        # Otherwise the number of steps set for fine-tuning would override the epochs.
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
    loss: torch.Tensor | None,
    outputs: Any,
    targets: Any,
    labels: torch.Tensor | None,
    inputs: Mapping[str, Any],
    model: PreTrainedModel,
    config: HapConfig,
    counted: bool = True,
) -> torch.Tensor:
    """Combines the loss of the labels with the distillation losses, by `config`'s weights.

    Args:
        loss (`torch.Tensor`, *optional*): The mean loss of the labels. Without it distillation has the whole weight.
        outputs (`Any`): Outputs of the pruned model, in any form that `Trainer` accepts.
        targets (`Any`): Outputs of the dense model, in the same form.
        labels (`torch.Tensor`, *optional*): The batch's labels.
        inputs (`Mapping[str, Any]`): The batch, whose attention masks tell padding.
        model (`PreTrainedModel`): The pruned model, unwrapped.
        config (`HapConfig`): The weights of the losses.
        counted (`bool`, *optional*, defaults to `True`): Whether any label of the batch counts. If none does, the loss
            of the labels is undefined and weighs nothing.

    Returns:
        `torch.Tensor`: The weighted sum.

    Raises:
        ValueError: If the outputs have no logits, or the dense model has no outputs of the same names.
    """
    if loss is None:
        total = _distance_without_labels(outputs, targets, inputs, model, config)
    else:
        distilled = _distance(logits_of(outputs, loss), targets, labels, inputs, model, config)
        own = loss if counted else torch.zeros_like(loss)
        total = (1 - config.distillation) * own + config.distillation * distilled
    if config.distillation_hidden:
        total = total + config.distillation_hidden * hidden_distance(outputs, targets, inputs)
    return total


def _distance(
    student: Mapping[str, torch.Tensor],
    targets: Any,
    labels: torch.Tensor | None,
    inputs: Mapping[str, Any],
    model: PreTrainedModel,
    config: HapConfig,
) -> torch.Tensor:
    """Distance of a model's logits from those among the dense model's outputs."""
    teacher = named_tensors(targets)
    if missing := student.keys() - teacher.keys():
        raise ValueError(
            f"The teacher has no outputs {sorted(missing)}, which the model has; it returns {sorted(teacher)}. Give a "
            "teacher whose outputs have the same form, or set distillation=0."
        )
    problem_type = model.config.problem_type
    if problem_type is None and labels is not None and labels.is_floating_point() and labels.ndim > 1:
        # The model's built-in loss would infer the same; a custom loss leaves problem_type unset.
        problem_type = "multi_label_classification" if labels.shape[-1] > 1 else "regression"
    return distillation_loss(
        student,
        teacher,
        config.distillation_temperature,
        problem_type=problem_type,
        labels=labels,
        mask=mask_of(inputs, decoded=bool(model.config.is_encoder_decoder)),
        shifted=shifts_labels(model),
    )


def _distance_without_labels(
    outputs: Any, targets: Any, inputs: Mapping[str, Any], model: PreTrainedModel, config: HapConfig
) -> torch.Tensor:
    """Distance of a model's logits, or else of its embeddings, from the dense model's."""
    if logits := named_logits(model, outputs):
        return _distance(logits, targets, None, inputs, model, config)
    pooled = SelfLoss(normalize=False)
    return embedding_loss(*(pooled.embedding(model, found, inputs) for found in (outputs, targets)))
