"""Reports pruning to the callbacks of `HapTrainer`."""

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
    """A `TrainerCallback` with two more events, at the start and the end of pruning. Override the methods you need.

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
        """Called after the plan was made and validated, before anything is removed."""

    def on_prune_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        plan: PruningPlan,
        **kwargs: Any,
    ) -> None:
        """Called after the model was pruned and refitted and its costs were measured."""


def tell_callbacks(trainer: Trainer, event: str, model: PreTrainedModel, plan: PruningPlan) -> None:
    """Calls the method `event` of every `HapCallback` of a trainer."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, HapCallback):
            getattr(callback, event)(trainer.args, trainer.state, trainer.control, model=model, plan=plan)
