"""`HapTrainer`: `transformers.Trainer` that can also score, prune and recover."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .blocks import attention_blocks
from .config import HapConfig
from .planning import PruningPlan, plan_pruning
from .sensitivity import Sensitivity, estimate_sensitivity
from .surgery import apply_plan


logger = logging.get_logger(__name__)


class HapTrainer(Trainer):
    """A `Trainer` with a pruning step. Without `hap_config` it is `Trainer` in every respect.

    Args:
        hap_config (`HapConfig`, *optional*): What to remove and how to choose it.
        args, kwargs: Those of `Trainer`.

    Example:

    ```python
    trainer = HapTrainer(model, args, train_dataset=..., eval_dataset=..., hap_config=HapConfig(ratio=0.4))
    trainer.train()       # fine-tune
    trainer.prune()       # score the heads, remove the insensitive ones for real
    trainer.train()       # recover
    trainer.save_model()  # loads with AutoModelFor...from_pretrained once hap_transformers is imported
    ```
    """

    def __init__(self, *args, hap_config: HapConfig | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if hap_config is not None:
            attention_blocks(self._unwrapped_model())  # Refuses an unknown architecture before hours of fine-tuning.
        self.hap_config = hap_config
        self._has_own_optimizer = self.optimizer is not None
        self.sensitivity: Sensitivity | None = None
        self.pruning_plan: PruningPlan | None = None

    def train(self, *args, **kwargs) -> TrainOutput:
        """Trains as `Trainer.train` does; after `prune()`, with the recovery settings of `hap_config`."""
        with self._recovery_arguments():
            return super().train(*args, **kwargs)

    def estimate_sensitivity(self) -> Sensitivity:
        """Scores the heads of the model on the training set, with this trainer's `compute_loss`.

        Examples are drawn by `args.seed` and go in batches of the training batch size, in the training's precision;
        processes share the batches out.

        Raises:
            ValueError: If there is no `hap_config` or no training data, and as
                [`hap_transformers.estimate_sensitivity`] does.
        """
        config = self._require_config()
        self.sensitivity = estimate_sensitivity(
            self._unwrapped_model(),
            self._scoring_batches(config.max_examples),
            config.method,
            components=("heads",),  # What plans remove.
            num_probes=config.num_probes,
            tolerance=config.tolerance,
            max_examples=config.max_examples,
            seed=self.args.seed,
            loss_fn=self._scoring_loss,
            progress=not self.args.disable_tqdm,
            accelerator=self.accelerator,
        )
        return self.sensitivity

    def prune(self, plan: PruningPlan | None = None) -> PruningPlan:
        """Removes heads from the model for real.

        Optimizer, scheduler and wrapped model are dropped: they refer to tensors that no longer exist.

        Args:
            plan (`PruningPlan`, *optional*): What to remove. By default heads are scored and planned by `hap_config`.

        Returns:
            `PruningPlan`: What was removed.

        Raises:
            ValueError: If there is no `hap_config`, or the plan does not fit the model, which is then untouched.
        """
        config = self._require_config()
        model = self._unwrapped_model()
        if plan is None:
            plan = plan_pruning(
                self.estimate_sensitivity(),
                model,
                budget=config.budget,
                ratio=config.ratio,
                min_heads=config.min_heads,
            )
        apply_plan(model, plan)
        model.add_model_tags(["hap", "pruned"])
        self.model = self.model_wrapped = model
        if self._has_own_optimizer:
            logger.warning(
                "The optimizer passed to HapTrainer holds weights that were removed, and is dropped; the next train() "
                "makes one from the training arguments. Pass optimizer_cls_and_kwargs to keep your choice."
            )
            self._has_own_optimizer = False
        self.optimizer = self.lr_scheduler = None
        self.accelerator.free_memory()
        self.pruning_plan = plan
        logger.info(f"Removed {plan.num_heads} of {sum(plan.original_heads)} attention heads.")
        return plan

    def _require_config(self) -> HapConfig:
        if self.hap_config is None:
            raise ValueError("This HapTrainer has no hap_config; pass hap_config=HapConfig(...) to score and prune.")
        return self.hap_config

    def _unwrapped_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _scoring_batches(self, max_examples: int) -> DataLoader:
        dataset = self.train_dataset
        if dataset is None:
            raise ValueError("HapTrainer scores heads on the training set, and has none; pass train_dataset.")
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.args.seed))
            dataset = Subset(dataset, order[:max_examples].tolist())
        return DataLoader(
            dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="scoring"),
        )

    def _scoring_loss(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        return self.compute_loss(model, self._prepare_inputs(inputs))

    @contextmanager
    def _recovery_arguments(self) -> Iterator[None]:
        """Puts the recovery settings in place of the training arguments' while a pruned model trains."""
        recovery = {}
        if self.pruning_plan is not None:
            recovery = {
                "num_train_epochs": self.hap_config.recovery_epochs,
                "learning_rate": self.hap_config.recovery_learning_rate,
            }
        recovery = {name: value for name, value in recovery.items() if value is not None}
        original = {name: getattr(self.args, name) for name in recovery}
        for name, value in recovery.items():
            setattr(self.args, name, value)
        try:
            yield
        finally:
            for name, value in original.items():
                setattr(self.args, name, value)
