"""What of the figures that `Trainer.evaluate` gives says how good a model is."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from transformers import TrainerState


# Ends of the names that `Trainer.evaluate` adds to the metrics.
NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")


def own_metrics(figures: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among a trainer's figures, without the prefix `eval_` that they must have."""
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in figures.items()
        if name.startswith("eval_") and isinstance(value, Real) and not name.endswith(NOT_METRICS)
    }


def metrics_of_best(state: TrainerState) -> dict[str, float]:
    """The metrics that a trainer logged at its best checkpoint."""
    found = (own_metrics(entry) for entry in state.log_history if entry.get("step") == state.best_global_step)
    return {name: value for metrics in found for name, value in metrics.items()}
