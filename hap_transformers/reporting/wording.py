"""Words that cards, pages and the `hap` command share."""

from collections.abc import Iterable

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
