"""Words that cards, pages and the `hap` command share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..components.groups import KINDS, Group


COSTS = {
    "parameters": "parameters",
    "encoder_parameters": "of these in the encoder",
    "flops": "FLOPs, one batch",
    "latency_ms": "latency, one batch, ms",
}
# Any other budget counts the components of one kind.
MEASURES = {
    "params": "the dense encoder's parameters",
    "flops": "the dense encoder's floating point operations",
    "latency": "the dense encoder's time",
}


def budget_in_words(budget: str) -> str:
    """What a plan's ratio is a share of."""
    return f"all {label_of(budget)}" if budget in KINDS else MEASURES.get(budget, budget)


def label_of(kind: str) -> str:
    """The label of a kind, or its name where the kind is not registered in this process."""
    return KINDS[kind].label if kind in KINDS else kind


def count_left(groups: Iterable[Group]) -> str:
    """Counts what groups of one kind have left, such as `"3 of 4"`.

    Kinds that are numbered anew after each removal do not know the dense model's count: `"28"`.
    """
    members = list(groups)
    left = f"{sum(group.num_components for group in members)}"
    dense = sum(group.original for group in members)
    return f"{left} of {dense}" if members[0].kind.keeps_numbers else left


def metric_names(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Names of the metrics of all phases in the order in which they come, losses last."""
    names = dict.fromkeys(name for values in metrics.values() for name in values)
    return sorted(names, key=lambda name: name.endswith("loss"))


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """A metric with the ends of its interval, such as `"0.8500 (0.810 to 0.890)"`, or nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.4f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def metric_cells(results: Mapping[str, Any], phase: str) -> list[str]:
    """The metrics of a phase with their intervals, in the order of [`metric_names`]."""
    values, intervals = results["metrics"][phase], results.get("intervals", {}).get(phase, {})
    return [with_interval(values.get(name), intervals.get(name)) for name in metric_names(results["metrics"])]
