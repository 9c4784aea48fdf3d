"""What `HapTrainer` tells callbacks about pruning."""

from typing import Any

from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..surgery.plan import PruningPlan


class HapCallback(TrainerCallback):
    """A `TrainerCallback` that hears of pruning, too. Override what you need.

    Example:

    ```python
    class Announce(HapCallback):
        def on_prune_end(self, args, state, control, model, plan, **kwargs):
            print(f"{plan.count('heads')} heads are gone.")

    trainer = HapTrainer(..., callbacks=[Announce()])
    ```
    """

    def on_prune_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        plan: PruningPlan,
        **kwargs: Any,
    ) -> None:
        """Called when a plan is made and found to fit, before anything is removed."""

    def on_prune_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        plan: PruningPlan,
        **kwargs: Any,
    ) -> None:
        """Called when the model is pruned and refitted, and its costs are measured."""


def tell_callbacks(trainer: Trainer, event: str, model: PreTrainedModel, plan: PruningPlan) -> None:
    """Calls a method of a trainer's callbacks that hear of pruning."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, HapCallback):
            getattr(callback, event)(trainer.args, trainer.state, trainer.control, model=model, plan=plan)
