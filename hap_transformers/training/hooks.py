"""What differs between trainers: how the model is reached, how a batch becomes its inputs, what its losses are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    DefaultDataCollator,
    PreTrainedModel,
    Trainer,
    default_data_collator,
)

from ..data.calibration import calibration_batches
from ..refit.dense_copy import own_all, sharing_copy
from ..sensitivity.batches import counts, shifts_labels
from ..sensitivity.outputs import loss_of
from ..sensitivity.task import model_loss_and_outputs
from .checks import validate_teacher
from .config import HapConfig
from .custom_loss import model_inputs
from .recovery import no_labels, with_distillation


# Collators that make batches of nothing but the columns, as `default_data_collator` does.
ADD_NO_LABELS = (DefaultDataCollator, DataCollatorWithPadding)

# `compute_loss` of the class that a trainer extends.
ComputeLoss = Callable[..., Any]


class TrainerHooks:
    """What `HapTrainerMixin` asks about the trainer that it extends.

    These are the answers for `Trainer` and for subclasses that train a model of Transformers on batches of its inputs.
    For another trainer, override what differs in a subclass and register it by [`register_hooks`].

    Args:
        trainer (`HapTrainerMixin`): The trainer that has these hooks.

    Attributes:
        scores (`bool`): Whether `compute_loss` is called to score or refit, not to train.
        package (`str`): The package of the trainer. A method of its class that makes loaders of training batches is
            not taken for one of the user's own, whose batches are scored as they come.
        several_datasets (`bool`): Whether the trainer takes a mapping of data sets (`DatasetDict`) for one.
    """

    package = "transformers"
    several_datasets = False

    def __init__(self, trainer: Any):  # Its module imports this one.
        self.trainer, self.scores = trainer, False
        self._instead: HapConfig | None = None

    def validate(self, config: HapConfig) -> None:
        """Refuses settings that this trainer cannot follow."""

    def validate_teacher(self, teacher: Any, config: HapConfig | None) -> None:
        """Refuses what is no teacher of this trainer's model."""
        validate_teacher(self.model(teacher), self.student, config)

    def validate_labels(self, compute_loss: ComputeLoss, config: HapConfig) -> None:
        """Refuses a training set without labels where recovery takes a share of their loss.

        Only the columns of data sets are looked at, and only if the batches are made of them as they are. Otherwise
        training tells of the first batch.

        Args:
            compute_loss (`Callable`): That of the class that the mixin extends.
            config (`HapConfig`): The weights of the losses.

        Raises:
            ValueError: If there are none.
        """
        trainer = self.trainer
        columns, collator = getattr(trainer.train_dataset, "column_names", None), trainer.data_collator
        as_they_are = collator is default_data_collator or type(collator) in ADD_NO_LABELS
        if not as_they_are or not isinstance(columns, list) or not trainer.label_names:
            return
        renamed = {"label", "label_ids"} & set(columns)
        if 0 < config.distillation < 1 and not renamed and self.lacks_labels(compute_loss, columns):
            raise ValueError(no_labels(self.student, config))

    def model(self, trained: nn.Module) -> PreTrainedModel:
        """Returns the model to prune inside of what the trainer trains, or of a teacher."""
        return trained  # type: ignore[return-value]

    def dense_copy(self, model: PreTrainedModel) -> PreTrainedModel:
        """Copies the model before it is pruned. The copy may share its parameters."""
        return sharing_copy(model)

    def teacher(self, dense: PreTrainedModel) -> nn.Module:
        """Makes a teacher of the dense copy, which then shares no parameters with the pruned model."""
        own_all(dense, self.student)  # Training changes the parameters that pruning has left.
        return dense

    def card(self) -> dict[str, Any]:
        """What the card of what the trainer saves needs to know beside the model, as arguments of its template."""
        return {}

    def loader(self, dataset: Any, max_examples: int) -> Iterable[Any]:
        """Makes training batches of randomly drawn examples for scoring and refit."""
        trainer = self.trainer
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="scoring")
        return calibration_batches(dataset, max_examples, trainer.args.seed, trainer._train_batch_size, collate)

    def inputs(self, batch: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Makes batches for scoring and refit of one training batch. Their first dimension is the examples."""
        yield batch

    def forward_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns what the model itself takes of such a batch."""
        return model_inputs(self.trainer, inputs)

    def scoring_loss(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the mean loss of such a batch, by which components are scored."""
        self.scores = True
        try:
            return self.trainer.compute_loss(model, dict(inputs))
        finally:
            self.scores = False

    def run(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
        """Runs the model, pruned or dense, on such a batch, for the refit and to measure costs."""
        return self.scoring_loss(model, inputs)

    def loss_to_score(
        self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """What the mixin's `compute_loss` returns inside of [`scoring_loss`].

        Args:
            compute_loss (`Callable`): That of the class that the mixin extends.
            model (`nn.Module`): The model.
            inputs (`dict[str, Any]`): The batch.
            return_outputs (`bool`, *optional*, defaults to `False`): Whether to return the model's outputs, too.
        """
        if self.lacks_labels(compute_loss, inputs):
            found = model_loss_and_outputs(model, inputs)  # type: ignore[arg-type]
            return found if return_outputs else found[0]
        return compute_loss(model, inputs, return_outputs)

    def recovery_loss(
        self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """The mean loss of a training batch with distillation, and the outputs of the model.

        Args:
            compute_loss (`Callable`): That of the class that the mixin extends.
            model (`nn.Module`): The model, which may be wrapped.
            inputs (`dict[str, Any]`): The batch.

        Raises:
            ValueError: If the batch has no labels, and their loss has a weight.
        """
        trainer, config, student = self.trainer, self.config, self.student
        if config.distillation_hidden:
            inputs = {**inputs, "output_hidden_states": True}
        given = dict(inputs)  # The loss may take labels out of the inputs.
        # Accelerate wraps the student's forward alone. In float32 the teacher's would take most of a training step.
        with torch.no_grad(), trainer.accelerator.autocast():
            targets = trainer.teacher(**model_inputs(trainer, given))
        if self.lacks_labels(compute_loss, given):
            outputs = model(**given)
            loss = loss_of(outputs)
        else:
            loss, outputs = compute_loss(model, inputs, return_outputs=True)
        if loss is None and config.distillation < 1:
            raise ValueError(no_labels(student, config))
        labels = given.get(trainer.label_names[0]) if len(trainer.label_names) == 1 else None
        counted = counts(given, shifts_labels(student))
        return with_distillation(loss, outputs, targets, labels, given, student, config, counted), outputs

    def distance_to_dense(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The mean distance of a batch's outputs from the dense model's, by which a recovery is judged.

        Args:
            compute_loss (`Callable`): That of the class that the mixin extends.
            model (`nn.Module`): What the trainer trains.
            inputs (`dict[str, Any]`): A training batch.
        """
        self._instead = replace(self.config, distillation=1.0, distillation_temperature=1.0, distillation_hidden=0.0)
        try:
            with torch.enable_grad():  # Of outputs without names, the loss's graph tells which ones are logits.
                return self.recovery_loss(compute_loss, model, inputs)[0].detach()
        finally:
            self._instead = None

    def label_loss(self, compute_loss: ComputeLoss, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The mean loss of a batch's labels, by which a recovery is judged without a dense model.

        Args:
            compute_loss (`Callable`): That of the class that the mixin extends.
            model (`nn.Module`): What the trainer trains, in evaluation mode.
            inputs (`dict[str, Any]`): A training batch.
        """
        return self.trainer.compute_loss(model, dict(inputs))

    def lacks_labels(self, compute_loss: ComputeLoss, inputs: Collection[str]) -> bool:
        """Whether a batch has no labels, so that only the model itself could compute a loss of it.

        Args:
            compute_loss (`Callable`): That of the class that the mixin extends. One of its own may need no labels.
            inputs (`Collection[str]`): The batch, or the names of its entries.
        """
        own = getattr(compute_loss, "__func__", None) is not Trainer.compute_loss
        labelled = any(name in inputs for name in ("labels", *self.trainer.label_names))
        return not (own or labelled or self.trainer.compute_loss_func is not None)

    @property
    def has_dense(self) -> bool:
        """Whether the recovery follows a dense model."""
        return self.trainer.teacher is not None and self.config.distils

    @property
    def config(self) -> HapConfig:
        """The trainer's configuration."""
        return self._instead or self.trainer._require_config()

    @property
    def student(self) -> PreTrainedModel:
        """The model to prune, or that was pruned."""
        return self.trainer._unwrapped_model()


HOOKS: dict[tuple[str, str], type[TrainerHooks]] = {}


def register_hooks(package: str, trainer: str, hooks: type[TrainerHooks]) -> None:
    """Registers the hooks of a class of trainers and of its subclasses.

    The class is known by its name, so that its package need not be installed.

    Args:
        package (`str`): The package of the class, such as `"trl"`.
        trainer (`str`): Name of the class, such as `"SFTTrainer"`.
        hooks (`type[TrainerHooks]`): Their hooks.
    """
    HOOKS[package, trainer] = hooks


def hooks_of(trainer: Any) -> TrainerHooks:
    """Makes the hooks of a trainer: those registered for the nearest class that it extends."""
    names = [(base.__module__.partition(".")[0], base.__name__) for base in type(trainer).__mro__]
    return next((HOOKS[name] for name in names if name in HOOKS), TrainerHooks)(trainer)
