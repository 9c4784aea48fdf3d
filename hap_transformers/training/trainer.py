"""`HapTrainer`: `transformers.Trainer` that can also score, prune and recover."""

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..checkpoints.remote_code import export_remote_code
from ..components.groups import KINDS, find_groups
from ..components.slicing import validate_sliceable
from ..components.structure import recorded_structure
from ..data.calibration import calibration_batches
from ..data.metrics import metrics_of_best, own_metrics
from ..efficiency import measure_costs
from ..files import whole_files
from ..planning.latency_table import LatencyTable
from ..planning.plan_pruning import plan_pruning
from ..refit.reconstruct import reconstruct
from ..reporting.card import TAGS, base_model_of
from ..reporting.hub import write_card
from ..sensitivity import Sensitivity, estimate_sensitivity
from ..sensitivity.batches import scored_batches
from ..surgery.apply_plan import apply_plan
from ..surgery.plan import PruningPlan
from ..surgery.undo import undone_on_error
from ..tokens import validate_length, with_length
from .callbacks import tell_callbacks
from .config import HapConfig
from .custom_loss import averages_over_batches, counting_items, model_inputs
from .processes import made_once, validate_same_plan
from .recovery import NO_TEACHER, NOT_DISTILLED, OPTIMIZER_DROPPED, recovery_arguments, with_distillation
from .resuming import last_whole_checkpoint, seeded_by_epoch, validate_same_structure


logger = logging.get_logger(__name__)

# Examples in the batch whose FLOPs and latency the card tells.
COST_EXAMPLES = 8


class HapTrainer(Trainer):
    """A `Trainer` with a pruning step. Without `hap_config` it is `Trainer` in every respect.

    Args:
        hap_config (`HapConfig`, *optional*): What to remove and how to choose it.
        teacher (`PreTrainedModel`, *optional*): The model to distil from while a pruned one trains. By default the
            dense model that the first `prune()` finds; it is not saved.
        latency_table (`LatencyTable`, *optional*): Seconds on the device that the model shall run on, for
            `budget="latency"`. By default `prune()` measures one where it runs.
        args, kwargs: Those of `Trainer`.

    Example:

    ```python
    trainer = HapTrainer(model, args, train_dataset=train, hap_config=HapConfig(ratio=0.6))
    trainer.train()  # fine-tune
    trainer.prune()  # score heads and neurons, remove some for real, refit the others
    trainer.train()  # recover
    trainer.save_model()  # after `import hap_transformers`, from_pretrained loads it
    ```
    """

    def __init__(
        self,
        *args,
        hap_config: HapConfig | None = None,
        teacher: PreTrainedModel | None = None,
        latency_table: LatencyTable | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if hap_config is not None:
            find_groups(self._unwrapped_model())  # Refuses an unknown architecture before hours of fine-tuning.
            if hap_config.sequence_length is not None:
                validate_length(self._unwrapped_model(), hap_config.sequence_length)
            if self.compute_loss_func is not None:
                self.compute_loss_func = counting_items(self.compute_loss_func)
        self.hap_config, self.teacher, self.latency_table = hap_config, teacher, latency_table
        self._has_own_optimizer = self.optimizer is not None
        self.sensitivity: Sensitivity | None = None
        self.pruning_plan: PruningPlan | None = None
        # What `create_model_card` tells: metrics by phase, costs dense and pruned.
        self.results: dict[str, dict[str, Any]] = {"metrics": {}}
        self._phase = "pruned" if self._is_pruned() else "dense"
        self._exports_remote_code = self._has_distilled = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """Trains as `Trainer.train` does; a pruned model with the recovery settings of `hap_config`.

        Checkpoints of a pruned model go into the folder `_recovery` of the output folder.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint to go on from. `True` is the newest one
                that was written to the end.
            args, kwargs: Those of `Trainer.train`.

        Raises:
            ValueError: If there is no such checkpoint, or it is of a model pruned otherwise.
        """
        if self._phase == "pruned":
            self._phase = "recovered"
        if self.teacher is not None and self._distils():
            self.teacher.eval().to(self.args.device)
        elif self._phase == "recovered" and self.hap_config is not None and self.hap_config.distils:
            logger.warning(NO_TEACHER)
        config = self.hap_config if self._phase == "recovered" else None
        with nullcontext() if config is None else recovery_arguments(self.args, config):
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir), self._unwrapped_model())
                if resume_from_checkpoint is None:
                    raise ValueError(f"No whole checkpoint to resume from in '{self.args.output_dir}'.")
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluates as `Trainer.evaluate` does, and keeps the metrics for the model card."""
        metrics = super().evaluate(*args, **kwargs)
        if self.hap_config is not None:
            self.results["metrics"].setdefault(self._phase, {}).update(own_metrics(metrics))
        return metrics

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Computes the loss as `Trainer.compute_loss` does, and that of distillation while a pruned model trains."""
        if self.teacher is None or not (model.training and self._distils()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._has_distilled = True
        # The loss may take them out of the inputs.
        labels = inputs.get(self.label_names[0]) if len(self.label_names) == 1 else None
        mask = inputs.get("attention_mask")
        if self._require_config().distillation_hidden:
            inputs = {**inputs, "output_hidden_states": True}
        with torch.no_grad():
            targets = self.teacher(**model_inputs(self, inputs))
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True)
        loss = with_distillation(loss, outputs, targets, labels, mask, self._unwrapped_model(), self._require_config())
        if not averages_over_batches(self, num_items_in_batch):
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """Trains on a batch as `Trainer.training_step` does, and warns where a loss of one's own does not distil."""
        loss = super().training_step(*args, **kwargs)
        if self._distils() and not self._has_distilled:
            self._has_distilled = True
            logger.warning(NOT_DISTILLED.format(name=type(self).__name__))
        return loss

    def estimate_sensitivity(self) -> Sensitivity:
        """Scores heads and neurons of the model on the training set, with this trainer's `compute_loss`.

        Examples are drawn by `args.seed` and go in batches of the training batch size, in the training's precision;
        processes share the batches out.

        Raises:
            ValueError: If there is no `hap_config` or no training data, and as
                [`hap_transformers.estimate_sensitivity`] does.
        """
        config, model = self._require_config(), self._placed_model()
        self.sensitivity = estimate_sensitivity(
            model,
            self._scoring_batches(config.max_examples),
            config.method,
            components=config.kinds if config.budget in KINDS else None,
            num_probes=config.num_probes,
            tolerance=config.tolerance,
            max_examples=config.max_examples,
            seed=self.args.seed,
            loss_fn=self._scoring_loss,
            progress=not self.args.disable_tqdm,
            accelerator=self.accelerator,
        )
        figures = {"seconds": self.sensitivity.seconds, "reliability": self.sensitivity.reliability}
        self.log({f"hap_score_{name}": value for name, value in figures.items() if value is not None})
        return self.sensitivity

    def plan(self, sensitivity: Sensitivity) -> PruningPlan:
        """Plans by `hap_config` what to remove from the model, which is only looked at.

        Args:
            sensitivity (`Sensitivity`): Scores of the model as it is.

        Raises:
            ValueError: As [`plan_pruning`] does.
        """
        config, model = self._require_config(), self._placed_model()
        inputs = None
        if config.sequence_length is not None:
            inputs = with_length(self._prepare_inputs(next(iter(self._scoring_batches(1)))), config.sequence_length)
        elif config.budget in ("flops", "latency"):
            inputs = self._prepare_inputs(next(iter(self._scoring_batches(COST_EXAMPLES))))
        inputs = None if inputs is None else model_inputs(self, inputs)
        if config.budget == "latency" and self.latency_table is None and inputs is not None:
            measure = partial(LatencyTable.measure, model, inputs, progress=not self.args.disable_tqdm)
            self.latency_table = made_once(measure, self.accelerator)
        return plan_pruning(sensitivity, model, config, inputs=inputs, latency_table=self.latency_table)

    def prune(self, plan: PruningPlan | None = None) -> PruningPlan:
        """Removes heads and neurons from the model for real, and refits what is left on training examples.

        Optimizer, scheduler and wrapped model are dropped: they refer to tensors that no longer exist.

        Args:
            plan (`PruningPlan`, *optional*): What to remove. By default heads and neurons are scored and planned by
                `hap_config`.

        Returns:
            `PruningPlan`: What was removed.

        Raises:
            ValueError: If there is no `hap_config` or no training data to refit on, the plan does not fit the model,
                processes have different plans, or the refit fails; the model is then as it was.
        """
        config, model = self._require_config(), self._placed_model()
        validate_same_plan(plan, self.accelerator)
        if plan is None:
            plan = self.plan(self.estimate_sensitivity())
            validate_same_plan(plan, self.accelerator)
        plan.validate(model)
        batches = self._refit_batches() if config.refit else None
        if config.refit:
            validate_sliceable(model, find_groups(model))  # A refit also reaches blocks that lose nothing.
        if not self._is_pruned():
            self._note_costs(model, "dense")
        tell_callbacks(self, "on_prune_begin", model, plan)
        dense = copy.deepcopy(model) if config.refit or config.distils else None
        with undone_on_error(model):
            apply_plan(model, plan)
            self._note_costs(model, "pruned")  # Before the refit, which puts back what it wrote if it fails itself.
            if batches is not None and dense is not None:
                reconstruct(
                    model,
                    dense,
                    batches,
                    ridge=config.ridge,
                    init_implants=tuple(plan.implants) if config.implant_init == "regression" else (),
                    forward=self._scoring_loss,
                    progress=not self.args.disable_tqdm,
                    accelerator=self.accelerator,
                )
        if self.teacher is None and config.distils:
            self.teacher = dense
        model.add_model_tags(list(TAGS))
        self.model = self.model_wrapped = model
        if self._has_own_optimizer:
            logger.warning(OPTIMIZER_DROPPED)
            self._has_own_optimizer = False
        self.optimizer = self.lr_scheduler = None
        self.model_init = None  # type: ignore[assignment]  # The next train() would begin with a new dense model.
        self.accelerator.free_memory()
        self.pruning_plan = plan
        self._phase = "pruned"
        for phase in ("pruned", "recovered"):  # Those of a model pruned less.
            self.results["metrics"].pop(phase, None)
        vars(model).update(pruning_results=self.results, pruning_plan=plan)  # For `model.push_to_hub`.
        counts = {f"hap_{kind}_removed": plan.count(kind) for kind in plan.removed}
        costs = {f"hap_{k}": self.results[k]["pruned"] for k in ("parameters", "flops") if k in self.results}
        self.log({**counts, **costs})
        tell_callbacks(self, "on_prune_end", self._unwrapped_model(), plan)
        return plan

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
    ) -> None:
        """Writes the card of a pruned model into the output folder; of a dense one, that of `Trainer`."""
        if not self._is_pruned():
            given = (language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            return super().create_model_card(*given)
        if not self.is_world_process_zero():
            return None
        model, folder = self._unwrapped_model(), Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        write_card(
            model,
            folder,
            results=self.results,
            plan=self.pruning_plan,
            base_model=finetuned_from or base_model_of(model),
            dataset=dataset,
            dataset_tags=dataset_tags,
            dataset_args=dataset_args,
            model_name=model_name or folder.resolve().name,
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

    def _get_train_sampler(self, *args) -> Sampler | None:
        sampler = super()._get_train_sampler(*args)
        return sampler if self.hap_config is None else seeded_by_epoch(sampler, self.args.seed)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        validate_same_structure(resume_from_checkpoint, self._unwrapped_model())
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        validate_same_structure(cast(str, self.state.best_model_checkpoint), self._unwrapped_model())
        super()._load_best_model()
        if self.hap_config is not None:  # The last evaluation was of other weights.
            self.results["metrics"].setdefault(self._phase, {}).update(metrics_of_best(self.state))

    def _distils(self) -> bool:
        wanted = self.hap_config is not None and self.hap_config.distils
        return wanted and self._phase == "recovered" and self.teacher is not None

    def _is_pruned(self) -> bool:
        model = self._unwrapped_model()
        return isinstance(model, PreTrainedModel) and recorded_structure(model.config) is not None

    def _note_costs(self, model: PreTrainedModel, size: str) -> None:
        """Keeps the costs of a few training examples; without data, only the numbers of parameters."""
        forward = None
        if self.train_dataset is not None:
            forward = partial(self._scoring_loss, model, next(iter(self._scoring_batches(COST_EXAMPLES))))
        for name, value in measure_costs(model, forward).items():
            self.results.setdefault(name, {})[size] = value

    def _require_config(self) -> HapConfig:
        if self.hap_config is None:
            raise ValueError("This HapTrainer has no hap_config; pass hap_config=HapConfig(...) to score and prune.")
        return self.hap_config

    def _unwrapped_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _placed_model(self) -> PreTrainedModel:
        """The model on the device of its inputs, to which Trainer takes some only when it wraps or evaluates them."""
        model = self._unwrapped_model()
        if self.model_wrapped is self.model and not self.is_model_parallel and model.device != self.args.device:
            self._move_model_to_device(model, self.args.device)
        return model

    def _scoring_batches(self, max_examples: int) -> DataLoader:
        dataset = self.train_dataset
        if dataset is None:
            raise ValueError("HapTrainer scores and refits on the training set, and has none; pass train_dataset.")
        collate_fn = self._get_collator_with_removed_columns(self.data_collator, description="scoring")
        return calibration_batches(dataset, max_examples, self.args.seed, self._train_batch_size, collate_fn)

    def _refit_batches(self) -> list[dict[str, Any]]:
        """The batches that are scored on, also of a data set whose length is not known."""
        count = self._require_config().max_examples
        return [batch.inputs for batch in scored_batches(self._scoring_batches(count), count)]

    def _scoring_loss(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        return cast(torch.Tensor, self.compute_loss(model, self._prepare_inputs(inputs)))
