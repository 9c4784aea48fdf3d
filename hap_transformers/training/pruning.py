"""The pruning steps of `HapTrainer`: score, plan, prune."""

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..alignment.align_kinds import align_kinds, alignment_undone
from ..alignment.basis_name import ALIGNED_ON
from ..components.groups import find_groups
from ..components.slicing import validate_sliceable
from ..components.structure import recorded_structure
from ..data.calibration import drawn_alike
from ..efficiency import measure_costs
from ..memory import named_out_of_memory
from ..planning.kinds import kinds_to_prune
from ..planning.latency_table import LatencyTable
from ..planning.plan_pruning import plan_pruning
from ..refit.dense_copy import sharing_copy
from ..refit.examples import refit_batches
from ..refit.reconstruct import reconstruct
from ..refit.tune_layers import epochs_to_tune, tune_layers
from ..reporting.card import TAGS
from ..sensitivity import Sensitivity, estimate_sensitivity
from ..sensitivity.batches import shifts_labels
from ..sensitivity.methods import get_method
from ..sensitivity.task import LossFunction
from ..surgery.apply_plan import apply_plan
from ..surgery.plan import PruningPlan
from ..surgery.undo import undone_on_error, values_undone
from ..tokens import with_length
from .callbacks import tell_callbacks
from .config import HapConfig
from .custom_loss import name_of_loss
from .held_out import makes_batches, split
from .hooks import TrainerHooks
from .processes import made_once, validate_same_plan
from .recovery import GRADUALLY, OPTIMIZER_DROPPED, SEARCHED


logger = logging.get_logger(__name__)

# Examples in the batch whose FLOPs and latency the card reports: enough to fill small matrix products, quickly timed.
COST_EXAMPLES = 8
SMALLER_REFIT = "Set a smaller per_device_train_batch_size, a smaller max_memory, or fewer refit_examples."


@dataclass
class PreparedBatches:
    """A loader's batches as a trainer prepares them.

    Args:
        loader (`Iterable[Any]`): The loader.
        prepare (`Callable`): Takes a batch in any form, returns batches of the model's inputs on its device.
        seed (`int`): Seed of what its collator draws, such as masked tokens.
    """

    loader: Iterable[Any]
    prepare: Callable[[Any], Iterable[dict[str, Any]]]
    seed: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return chain.from_iterable(map(self.prepare, drawn_alike(self.loader, self.seed)))


if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object  # The trainer that is extended comes after the mixin.


class PruningMixin(_Trainer):
    """The steps from scores to a pruned model; [`HapTrainerMixin`] adds recovery, saving and sharing."""

    hooks: TrainerHooks
    hap_config: HapConfig | None
    teacher: Any
    latency_table: LatencyTable | None
    sensitivity: Sensitivity | None
    pruning_plan: PruningPlan | None
    results: dict[str, dict[str, Any]]
    _phase: str
    _has_own_optimizer: bool

    def estimate_sensitivity(self) -> Sensitivity:
        """Scores the model's components on the training set, with this trainer's `compute_loss`.

        `args.seed` draws the examples. They come in batches of the training batch size, in the training's precision;
        processes share the batches.

        Where dimensions of heads or embeddings may go, these are aligned before ([`align_heads`],
        [`align_embeddings`]): their weights change, the model's outputs do not. Scores made while `train()` runs are
        of an aligned model, too, but the model is put back, as the optimizer belongs to the weights as they were.

        Raises:
            ValueError: If there is no `hap_config` or no training data, and as
                [`hap_transformers.estimate_sensitivity`] does.
        """
        config, model = self._require_config(), self._placed_model()
        kinds = kinds_to_prune(config.components, config.method, config, model)
        needs_data = get_method(config.method).sample is not None
        passes = {
            "num_probes": config.num_probes,
            "exact_directions": config.exact_directions,
            "seed": self.args.seed,
            "loss_fn": self._named_loss(),
            "progress": not self.args.disable_tqdm,
            "accelerator": self.accelerator,
        }
        with alignment_undone(model, kinds, always=self.is_in_train):
            batches = partial(self._scoring_batches, config.max_examples)
            align_kinds(model, kinds, batches, max_examples=min(config.max_examples, ALIGNED_ON), **passes)
            self.sensitivity = estimate_sensitivity(
                model,
                self._scoring_batches(config.max_examples) if needs_data else (),
                config.method,
                components=kinds,
                tolerance=config.tolerance,
                max_examples=config.max_examples,
                max_memory=config.max_memory,
                **passes,
            )
        figures = {"seconds": self.sensitivity.seconds, "reliability": self.sensitivity.reliability}
        self.log({f"hap_score_{name}": value for name, value in figures.items() if value is not None})
        return self.sensitivity

    def plan(self, sensitivity: Sensitivity) -> PruningPlan:
        """Plans by `hap_config` what to remove from the model, which is only read.

        Args:
            sensitivity (`Sensitivity`): Scores of the model as it is.

        Raises:
            ValueError: As [`plan_pruning`] does.
        """
        config, model = self._require_config(), self._placed_model()
        inputs = None
        if config.sequence_length is not None:
            inputs = with_length(self._first_batch(1), config.sequence_length)
        elif config.budget in ("flops", "latency"):
            inputs = self._first_batch(COST_EXAMPLES)
        inputs = None if inputs is None else self.hooks.forward_inputs(inputs)
        if config.budget == "latency" and self.latency_table is None and inputs is not None:
            precision = {"bf16": "bf16", "fp16": "fp16"}.get(self.accelerator.mixed_precision)
            timed = partial(LatencyTable.measure, mode=config.latency_mode, precision=precision)
            measure = partial(timed, model, inputs, progress=not self.args.disable_tqdm)
            self.latency_table = made_once(measure, self.accelerator)
        return plan_pruning(sensitivity, model, config, inputs=inputs, latency_table=self.latency_table)

    def prune(self, plan: PruningPlan | None = None) -> PruningPlan:
        """Physically removes components from the model, and refits what is left on training examples.

        Optimizer, scheduler and wrapped model are dropped, because they refer to tensors that no longer exist.

        Args:
            plan (`PruningPlan`, *optional*): What to remove. By default components are scored and planned by
                `hap_config`.

        Returns:
            `PruningPlan`: What was removed.

        Raises:
            ValueError: If there is no `hap_config` or no training data to refit on, `train()` is running, the plan
                does not fit the model, processes have different plans, or scoring or the refit fails; the model is
                then as it was.
        """
        config, model = self._require_config(), self._placed_model()
        if self.is_in_train:
            raise ValueError(f"prune() was called while train() runs, {GRADUALLY} Nothing was pruned.")
        validate_same_plan(plan, self.accelerator)
        kinds = () if plan is not None else kinds_to_prune(config.components, config.method, config, model)
        with alignment_undone(model, kinds):
            if plan is None:
                plan = self.plan(self.estimate_sensitivity())
                validate_same_plan(plan, self.accelerator)
            dense = self._remove(model, plan)
        if self.teacher is None and dense is not None and config.distils:
            self.teacher = self.hooks.teacher(dense)
        self._take_pruned(model, plan)
        counts = {f"hap_{kind}_removed": plan.count(kind) for kind in plan.removed}
        costs = {f"hap_{k}": self.results[k]["pruned"] for k in ("parameters", "flops") if k in self.results}
        self.log({**counts, **costs})
        tell_callbacks(self, "on_prune_end", self._unwrapped_model(), plan)
        return plan

    def _remove(self, model: PreTrainedModel, plan: PruningPlan) -> Any:
        """Removes what a plan names and refits the rest; returns the dense model if anything needs it."""
        config = self._require_config()
        plan.validate(model)
        batches = self._refit_batches(config.refit_examples) if config.refit else None
        if config.refit:
            validate_sliceable(model, find_groups(model))  # A refit also reaches blocks that lose nothing.
        if not self._is_pruned():
            self._note_costs(model, "dense")
        elif recorded_structure((joined := sharing_copy(model)).config) is None:  # It was aligned and lost nothing.
            self._note_costs(joined, "dense")
        tell_callbacks(self, "on_prune_begin", model, plan)
        dense = self.hooks.dense_copy(model) if config.refit or config.distils else None
        with undone_on_error(model):
            apply_plan(model, plan)
            self._note_costs(model, "pruned")  # Before the refit, which undoes its own changes if it fails.
            if batches is not None and dense is not None:
                with named_out_of_memory("the model was refitted", SMALLER_REFIT):
                    self._refit(model, dense, plan, batches)
        return dense

    def _refit(
        self, model: PreTrainedModel, dense: PreTrainedModel, plan: PruningPlan, batches: Iterable[dict[str, Any]]
    ) -> None:
        """Refits what is left, and tunes the layers unless that is not wanted."""
        config = self._require_config()
        epochs = epochs_to_tune(config.tuning_epochs, config.refit, model)
        common = {
            "forward": self.hooks.run,
            "progress": not self.args.disable_tqdm,
            "accelerator": self.accelerator,
            "max_memory": config.max_memory,
        }
        # One that fails in tuning would leave what the refit wrote into tensors that pruning did not replace, such as
        # statistics of BatchNorm.
        with values_undone([*model.parameters(), *model.buffers()] if epochs else ()):
            reconstruct(
                model,
                dense,
                batches,
                ridge=config.ridge,
                init_implants=tuple(plan.implants) if config.implant_init == "regression" else (),
                **common,
            )
            if epochs:
                again = self._refit_batches(config.refit_examples)
                tune_layers(model, dense, again, epochs=epochs, **common)

    def calibration_batches(self) -> list[dict[str, Any]]:
        """The batches that the model is scored on: training examples, on the model's device.

        Raises:
            ValueError: If there is no `hap_config` or no training data.
        """
        count = self._require_config().max_examples
        return list(self._cut(self._scoring_batches(count), count))

    def _is_pruned(self) -> bool:
        return self._structure() is not None

    def _structure(self) -> dict[str, Any] | None:
        """What the model's config records as pruned."""
        model = None if self.model is None else self._unwrapped_model()  # A search's trials begin without any.
        return recorded_structure(model.config) if isinstance(model, PreTrainedModel) else None

    def _take_pruned(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        """Puts the pruned model in the place of the dense one, and drops what refers to removed tensors."""
        model.add_model_tags(list(TAGS))
        trained = self._trained_model()
        # Otherwise Accelerate, which prepares a model once, would not compile it again.
        vars(trained).pop("_is_accelerate_prepared", None)
        if "_original_forward" in vars(trained):  # It also wraps the model's forward for low precision.
            trained.forward = vars(trained).pop("_original_forward")
        self.model = self.model_wrapped = trained
        if self._has_own_optimizer:
            logger.warning(OPTIMIZER_DROPPED)
            self._has_own_optimizer = False
        self.optimizer = self.lr_scheduler = None
        self.model_init = None  # type: ignore[assignment]  # The next train() would begin with a new dense model.
        self.accelerator.free_memory()
        self.pruning_plan = plan
        self._phase = "pruned"
        for phase in ("pruned", "recovered"):  # Metrics of a model pruned less.
            for measured in ("metrics", "intervals"):
                self.results.get(measured, {}).pop(phase, None)
        self.results.pop("recovery", None)
        vars(model).update(pruning_results=self.results, pruning_plan=plan)  # For `model.push_to_hub`.

    def _note_costs(self, model: PreTrainedModel, size: str) -> None:
        """Notes the costs of a few training examples; without data, only the numbers of parameters."""
        forward = None
        if self.train_dataset is not None:
            forward = partial(self.hooks.run, model, self._first_batch(COST_EXAMPLES))
        for name, value in measure_costs(model, forward).items():
            self.results.setdefault(name, {})[size] = value

    def _require_config(self) -> HapConfig:
        if self.hap_config is None:
            raise ValueError("This HapTrainer has no hap_config; pass hap_config=HapConfig(...) to score and prune.")
        return self.hap_config

    def _trained_model(self) -> nn.Module:
        """What the trainer trains, which has the model to prune inside or is that model."""
        return self.accelerator.unwrap_model(self.model)

    def _unwrapped_model(self) -> PreTrainedModel:
        return self.hooks.model(self._trained_model())

    def _placed_model(self) -> PreTrainedModel:
        """The model on the device of its inputs. Trainer moves some models only when it wraps or evaluates them."""
        if self.model is None:  # A hyperparameter search leaves none.
            logger.warning(SEARCHED)
            self.model = self.model_wrapped = self.call_model_init()
        model = self._unwrapped_model()
        if self.model_wrapped is self.model and not self.is_model_parallel and model.device != self.args.device:
            self._move_model_to_device(self._trained_model(), self.args.device)
        return model

    def _scoring_batches(self, max_examples: int) -> "PreparedBatches":
        return self._prepared(self._scoring_loader(max_examples))

    def _first_batch(self, examples: int) -> dict[str, Any]:
        """The first batch of so many training examples.

        Raises:
            ValueError: If there is none.
        """
        for batch in self._scoring_batches(examples):
            return batch
        raise ValueError(
            f"The train_dataset, a {type(self.train_dataset).__name__}, gives no examples, or none a second time. It "
            "is read several times, so its __iter__ must begin anew whenever it is called."
        )

    def _prepared(self, loader: Iterable[Any]) -> "PreparedBatches":
        def prepare(batch: Any) -> Iterable[dict[str, Any]]:
            return self.hooks.inputs(self._prepare_inputs(batch))

        return PreparedBatches(loader, prepare, self.args.seed)

    def _scoring_loader(self, max_examples: int) -> Iterable[Any]:
        if makes_batches(self):
            loader = self.get_train_dataloader()  # It may collate, draw or cut examples in its own way.
            if self.accelerator.num_processes > 1 and isinstance(loader, DataLoaderShard | DataLoaderDispatcher):
                raise ValueError(
                    f"{type(self).__name__} has its own train dataloader, prepared to give every process other "
                    "batches; scoring shares the batches out itself. Return the loader before accelerator.prepare "
                    "while trainer.is_in_train is False."
                )
            return loader
        if self.train_dataset is None:
            raise ValueError("HapTrainer scores and refits on the training set, and has none; pass train_dataset.")
        if isinstance(self.train_dataset, Sized) and not len(self.train_dataset):
            raise ValueError("HapTrainer scores and refits on the training set, and the train_dataset is empty.")
        return self.hooks.loader(self.train_dataset, max_examples)

    def _refit_batches(self, count: int) -> Iterator[dict[str, Any]]:
        """As many training examples as asked for, without those that a recovery is watched on."""
        rest, held_out = split(self, self._require_config())
        if held_out is None:
            return self._cut(self._scoring_batches(count), count)
        return self._cut(self._prepared(self.hooks.loader(rest, count)), count)

    def _cut(self, batches: Iterable[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
        """As many examples as asked for, also of a data set of unknown length."""
        shifted = shifts_labels(self._unwrapped_model())
        return refit_batches(batches, count, self._require_config().max_examples, shifted)

    def _named_loss(self) -> LossFunction:
        """The loss to score by under the name that messages give it."""

        def loss(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
            return self.hooks.scoring_loss(model, inputs)

        loss.__qualname__ = name_of_loss(self)
        return loss
