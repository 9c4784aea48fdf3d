"""Picks the metrics of model quality from the figures that `Trainer.evaluate` returns."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from transformers import TrainerState


# Endings of the names of figures that `Trainer.evaluate` adds to the metrics.
NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")


def quality_metrics(figures: Mapping[str, Any], prefix: str = "eval") -> dict[str, float]:
    """Returns the metrics among a trainer's figures.

    Args:
        figures (`Mapping[str, Any]`): What `Trainer.evaluate` returned, or an entry of its log.
        prefix (`str`, *optional*, defaults to `"eval"`): The `metric_key_prefix` of the evaluation. Only names that
            begin with it count. The prefix `"eval"` is removed, others stay.
    """
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in figures.items()
        if name.startswith(f"{prefix}_") and isinstance(value, Real) and not name.endswith(NOT_METRICS)
    }


def metrics_at(state: TrainerState, step: int | None) -> dict[str, float]:
    """Returns the metrics that a trainer logged at a step."""
    found = (quality_metrics(entry) for entry in state.log_history if entry.get("step") == step)
    return {name: value for metrics in found for name, value in metrics.items()}
