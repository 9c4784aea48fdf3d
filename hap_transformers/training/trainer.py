"""`HapTrainer`: `transformers.Trainer` that can also score, prune and recover. `HapTrainerMixin`: any such trainer."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, ModelCard
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..checkpoints.remote_code import export_remote_code
from ..components.depth import layers_left_out, layers_to_leave_out
from ..components.gguf import forget_gguf
from ..data.metrics import metrics_at, quality_metrics
from ..files import whole_files
from ..planning.latency_table import LatencyTable
from ..reporting.card import base_model_of
from ..reporting.hub import write_card
from ..sensitivity import Sensitivity
from ..surgery.plan import PruningPlan
from ..vocabulary.plan import VocabularyPlan
from . import language_trainers as language_trainers  # Registers hooks, as the next one does.
from . import sentence_trainers as sentence_trainers
from .checks import (
    validate_arguments,
    validate_latency,
    validate_loaded,
    validate_prunable,
    validate_recovery_check,
)
from .config import HapConfig
from .custom_loss import averages_over_batches, counting_items
from .dropout import without_dropout
from .hooks import hooks_of
from .pruning import PruningMixin
from .recovery import GRADUALLY, NO_TEACHER, NOT_DISTILLED, recovery_arguments, warn_of_dora
from .resuming import last_whole_checkpoint, seeded_by_epoch, take_basis, validate_same_structure
from .watching import watched


logger = logging.get_logger(__name__)


class HapTrainerMixin(PruningMixin):
    """Adds a pruning step to `Trainer` or a class that extends it. Without `hap_config` it changes nothing.

    The mixin comes first: `class MyTrainer(HapTrainerMixin, SFTTrainer): pass`. It works with `Trainer` and with
    classes that train a model of Transformers on batches of its inputs. For the trainers of Sentence Transformers and
    TRL, [`TrainerHooks`][hap_transformers.training.hooks.TrainerHooks] are registered that say what differs.

    Args:
        hap_config (`HapConfig`, *optional*): What to remove and how to choose it.
        teacher (`PreTrainedModel`, *optional*): The model to distil from while a pruned one trains, in the form that
            this trainer trains. By default the dense model that the first `prune()` finds; it is not saved.
        latency_table (`LatencyTable`, *optional*): Seconds on the device that the model shall run on, for
            `budget="latency"`. By default `prune()` measures one on the device it runs on.
        args, kwargs: Those of the trainer.

    Raises:
        TypeError: If `hap_config` is no `HapConfig`.
        ValueError: If the model cannot be pruned as `hap_config` asks, or recovery takes a share of the loss of labels
            and the training examples have none.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(HapTrainerMixin)]
        plain = [base.__name__ for base in before if issubclass(base, Trainer) and HapTrainerMixin not in base.__mro__]
        if plain:
            raise TypeError(f"Name HapTrainerMixin first: class {cls.__name__}(HapTrainerMixin, {plain[0]}).")

    def __init__(
        self,
        *args,
        hap_config: HapConfig | None = None,
        teacher: Any = None,
        latency_table: LatencyTable | None = None,
        **kwargs,
    ):
        self._structure_in_training: dict[str, Any] | None = None
        if hap_config is not None and not isinstance(hap_config, HapConfig):
            raise TypeError(f"hap_config is a {type(hap_config).__name__}; pass HapConfig(...).")
        self.hooks = hooks_of(self)
        given = kwargs.get("model", args[0] if args else None)
        if isinstance(given, PreTrainedModel):
            forget_gguf(given)  # Trainer refuses models that call themselves quantized.
            if hap_config is not None:
                validate_loaded("the model", given)
        super().__init__(*args, **kwargs)
        if hap_config is not None:
            self.hooks.validate(hap_config)
            validate_prunable(self._unwrapped_model(), hap_config)
            validate_latency(hap_config, self._unwrapped_model(), latency_table, self.args.device)
            self.hooks.validate_labels(super().compute_loss, hap_config)
            validate_recovery_check(hap_config, self.eval_dataset, self.hooks.several_datasets)
            validate_arguments(self.args, self._unwrapped_model(), hap_config, self.train_dataset)
            if callable(self.compute_loss_func):
                self.compute_loss_func = counting_items(self.compute_loss_func)
        if teacher is not None:
            self.hooks.validate_teacher(teacher, hap_config)
        self.vocabulary_plan: VocabularyPlan | None = None
        if hap_config is not None and hap_config.trim_vocabulary:
            from .trimming import trim_to_data_sets  # The package loads without datasets.

            self.vocabulary_plan = trim_to_data_sets(self, self._unwrapped_model(), teacher)
        self.hap_config, self.teacher, self.latency_table = hap_config, teacher, latency_table
        self._has_own_optimizer = self.optimizer is not None
        self.sensitivity: Sensitivity | None = None
        self.pruning_plan: PruningPlan | None = None
        # What `create_model_card` reports: metrics by phase, costs dense and pruned.
        self.results: dict[str, dict[str, Any]] = {"metrics": {}}
        if self.vocabulary_plan is not None:
            self.results["vocabulary"] = self.vocabulary_plan.summary()
        self._phase = "pruned" if self._is_pruned() else "dense"
        self._exports_remote_code = self._has_distilled = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """Trains as `Trainer.train` does. A pruned model trains with the recovery settings of `hap_config`.

        Checkpoints of a pruned model go into the folder `_recovery` of the output folder. The training of a pruned
        model keeps the best weights on examples that are held out, be it those from before (`recovery_check`).

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint to resume from. `True` takes the newest
                one that was written completely.
            args, kwargs: Those of `Trainer.train`.

        Raises:
            ValueError: If there is no such checkpoint, or it belongs to a model with another structure.
        """
        if self._phase == "pruned":
            self._phase = "recovered"
        self._structure_in_training = self._structure()
        if self.teacher is not None and self._distils():
            if self.model is not None:  # Either may have changed.
                self.hooks.validate_teacher(self.teacher, self.hap_config)
            self.hooks.validate_labels(super().compute_loss, self._require_config())
            self.teacher.eval().to(self.args.device)
        elif self._phase == "recovered" and self.hap_config is not None and self.hap_config.distils:
            logger.warning(NO_TEACHER)
        config = self.hap_config if self._phase == "recovered" else None
        with nullcontext() if config is None else recovery_arguments(self.args, config):
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir), self._unwrapped_model())
                if resume_from_checkpoint is None:
                    raise ValueError(f"No whole checkpoint to resume from in '{self.args.output_dir}'.")
            try:
                with self._without_dropout(config), watched(self, config, super().compute_loss):
                    return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self.is_in_train = False  # Trainer leaves it set where a training fails or is interrupted.

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs,
    ) -> dict[str, float]:
        """Evaluates as `Trainer.evaluate` does, and keeps the metrics for the model card.

        The card names metrics of another `metric_key_prefix` than `"eval"` with their prefix.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        if self.hap_config is not None:
            kept = quality_metrics(metrics, metric_key_prefix)
            self.results["metrics"].setdefault(self._phase, {}).update(kept)
        return metrics

    def hyperparameter_search(self, *args, **kwargs) -> Any:
        """Searches as `Trainer.hyperparameter_search` does. Each trial starts from a new model of `model_init`.

        Raises:
            ValueError: If `prune()` has dropped `model_init`: each trial would start from a new dense model.
        """
        if self._is_pruned() and self.model_init is None:
            raise ValueError(
                "hyperparameter_search() starts every trial from a new dense model, and prune() has dropped "
                "model_init for that reason. Search before pruning, or make a HapTrainer with a model_init that loads "
                "the pruned model by from_pretrained."
            )
        return super().hyperparameter_search(*args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Computes the loss as `Trainer.compute_loss` does, and adds distillation while a pruned model trains."""
        if self.hooks.scores:
            return self.hooks.loss_to_score(super().compute_loss, model, inputs, return_outputs)
        if self.teacher is None or not (model.training and self._distils()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._has_distilled = True
        loss, outputs = self.hooks.recovery_loss(super().compute_loss, model, inputs)
        if not averages_over_batches(self, num_items_in_batch):
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """Trains on a batch as `Trainer.training_step` does, and warns if a custom loss does not distil.

        Raises:
            ValueError: If the model was pruned since the optimizer was made.
        """
        if self._structure_in_training != self._structure():
            raise ValueError(f"The model was pruned while train() runs, {GRADUALLY}")
        loss = super().training_step(*args, **kwargs)
        if self._distils() and not self._has_distilled:
            self._has_distilled = True
            logger.warning(NOT_DISTILLED.format(name=type(self).__name__))
        return loss

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Makes the optimizer as `Trainer.create_optimizer` does."""
        self._structure_in_training = self._structure()  # A model_init makes the model after train() has begun.
        warn_of_dora(self._unwrapped_model())
        return super().create_optimizer(*args, **kwargs)

    def push_to_hub(self, *args, remote_code: bool = False, **kwargs) -> CommitInfo | None:  # type: ignore[override]
        """Uploads the model with its card, as `Trainer.push_to_hub` does.

        Args:
            remote_code (`bool`, *optional*, defaults to `False`): Whether to upload the code that rebuilds a pruned
                model, so that `trust_remote_code=True` loads it without this package.
            args, kwargs: Those of `Trainer.push_to_hub`.
        """
        self._exports_remote_code = remote_code
        return super().push_to_hub(*args, **kwargs)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **kwargs,
    ) -> None:
        """Writes the card of a pruned model into the output folder; of a dense one, that of the trainer."""
        if not self._is_pruned():
            given = dict(
                language=language,
                license=license,
                tags=tags,
                model_name=model_name,
                finetuned_from=finetuned_from,
                tasks=tasks,
                dataset_tags=dataset_tags,
                dataset=dataset,
                dataset_args=dataset_args,
                **kwargs,
            )  # Trainers may take fewer.
            return super().create_model_card(**{name: value for name, value in given.items() if value is not None})
        if not self.is_world_process_zero():
            return None
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self._write_card(
            folder,
            base_model=finetuned_from,
            dataset=dataset or kwargs.get("dataset_name"),
            dataset_tags=dataset_tags,
            dataset_args=dataset_args,
            model_name=model_name,
            language=language,
            license=license,
            tags=[tags] if isinstance(tags, str) else tags or (),
        )
        if self._exports_remote_code:
            export_remote_code(folder)  # The model has been saved there just before.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save or not isinstance(self._unwrapped_model(), PreTrainedModel):
            return super()._save(output_dir, state_dict)
        with whole_files(output_dir or str(self.args.output_dir)) as unfinished:
            super()._save(str(unfinished), state_dict)
            if self.hap_config is not None:
                self.hap_config.save(unfinished / "hap_config.json")
            card = unfinished / "README.md"
            # Some trainers write one, which does not say how to load a pruned model.
            if card.exists() and self._is_pruned():
                known = ModelCard.load(card).data
                card.unlink()
                about = {name: getattr(known, name) for name in ("base_model", "language", "license")}
                self._write_card(unfinished, dataset_tags=known.datasets, tags=known.tags or (), **about)

    def _write_card(self, folder: Path, **about: Any) -> None:
        """Writes the card of a pruned model into a folder, if there is none that somebody wrote."""
        model = self._unwrapped_model()
        about["base_model"] = about["base_model"] or base_model_of(model)
        about["model_name"] = about.get("model_name") or Path(str(self.args.output_dir)).resolve().name
        write_card(model, folder, results=self.results, plan=self.pruning_plan, **self.hooks.card(), **about)

    def _get_train_sampler(self, *args) -> Sampler | None:
        sampler = super()._get_train_sampler(*args)
        return sampler if self.hap_config is None else seeded_by_epoch(sampler, self.args.seed)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args) -> None:
        validate_same_structure(resume_from_checkpoint, self._unwrapped_model())
        with _as_saved(self._unwrapped_model()):
            super()._load_from_checkpoint(resume_from_checkpoint, *args)
        take_basis(resume_from_checkpoint, self._unwrapped_model())

    def _load_best_model(self) -> None:
        validate_same_structure(cast(str, self.state.best_model_checkpoint), self._unwrapped_model())
        with _as_saved(self._unwrapped_model()):
            super()._load_best_model()
        take_basis(cast(str, self.state.best_model_checkpoint), self._unwrapped_model())
        if self.hap_config is not None:  # The last evaluation was of other weights.
            found = metrics_at(self.state, self.state.best_global_step)
            self.results["metrics"].setdefault(self._phase, {}).update(found)

    def _without_dropout(self, config: HapConfig | None) -> AbstractContextManager[None]:
        """Switches dropout off for the recovery that a configuration asks for, if it does."""
        model = self.model and self._trained_model()
        return nullcontext() if model is None or config is None or config.recovery_dropout else without_dropout(model)

    def _distils(self) -> bool:
        wanted = self.hap_config is not None and self.hap_config.distils
        return wanted and self._phase == "recovered" and self.teacher is not None


def _as_saved(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Lets a model have the layers that its checkpoints have."""
    return layers_left_out(model, layers_to_leave_out(model))


class HapTrainer(HapTrainerMixin, Trainer):
    """A `Trainer` with a pruning step. Without `hap_config` it is `Trainer` in every respect.

    Args:
        hap_config (`HapConfig`, *optional*): What to remove and how to choose it.
        teacher (`PreTrainedModel`, *optional*): The model to distil from while a pruned one trains. By default the
            dense model that the first `prune()` finds; it is not saved.
        latency_table (`LatencyTable`, *optional*): Seconds on the device that the model shall run on, for
            `budget="latency"`. By default `prune()` measures one on the device it runs on.
        args, kwargs: Those of `Trainer`.

    Raises:
        ValueError: If the model cannot be pruned as `hap_config` asks, or recovery takes a share of the loss of labels
            and the training examples have none.

    Example:

    ```python
    trainer = HapTrainer(model, args, train_dataset=train, hap_config=HapConfig(ratio=0.6))
    trainer.train()  # fine-tune
    trainer.prune()  # score dimensions of heads and neurons, physically remove the cheapest, refit the others
    trainer.train()  # recover
    trainer.save_model()  # after `import hap_transformers`, from_pretrained loads it
    ```

    Without labels there is nothing to fine-tune on. Then recovery follows the dense model's outputs alone:

    ```python
    unlabelled = train.remove_columns("label")
    trainer = HapTrainer(model, args, train_dataset=unlabelled, hap_config=HapConfig(ratio=0.6, distillation=1.0))
    trainer.prune()
    trainer.train()
    ```
    """
