"""Words that cards, pages and the `hap` command share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..components.groups import KINDS, Group
from ..surgery.plan import PruningPlan
from .ranks import left_of


COSTS = {
    "parameters": "parameters",
    "encoder_parameters": "of these in the encoder",
    "flops": "FLOPs, one batch",
    "latency_ms": "latency, one batch, ms",
    "bytes": "size on disk, bytes",
    "tokens_per_second": "generated tokens a second",
}
# Any other budget counts the components of one kind.
MEASURES = {
    "params": "the dense encoder's parameters",
    "model": "all parameters of the dense model",
    "flops": "the dense encoder's floating point operations",
    "latency": "the dense encoder's time",
}


# How far outputs moved (see [`measure_fidelity`]): a label, and the value of a model that did not change.
FIDELITY = {
    "agreement": ("same predictions", 1.0),
    "kl": ("KL divergence, nats", 0.0),
    "correlation": ("correlation of values", 1.0),
    "relative_error": ("error of values, in standard deviations", 0.0),
    "cosine": ("cosine of embeddings", 1.0),
}


# A pruned model that takes more of the dense model's time saves none: repeated measurements differ by as much.
NOTICEABLY_FASTER = 0.95


def budget_in_words(budget: str) -> str:
    """What a plan's ratio is a share of."""
    return f"all {label_of(budget)}" if budget in KINDS else MEASURES.get(budget, budget)


def saved_in_words(plan: PruningPlan) -> str:
    """The parameters that every kind of a plan gave, such as "1,152 of attention heads and 816 of FFN neurons"."""
    return enumerated(f"{saved:,} parameters of {label_of(kind)}" for kind, saved in plan.saved.items())


def name_of_first(results: Mapping[str, Any]) -> str:
    """What the model is called that was pruned: `"dense"`, unless it had been pruned before."""
    return "before" if results.get("pruned_before") else "dense"


def no_faster(dense: float, pruned: float, batch: str, device: str) -> str | None:
    """A warning that a pruned model saves no time worth having, what it comes from, and what to do about it.

    Args:
        dense (`float`): Latency of the dense model, in any unit.
        pruned (`float`): That of the pruned model.
        batch (`str`): What was timed, such as `"1 x 128"`.
        device (`str`): Where.

    Returns:
        `str` or `None`: The warning, or nothing where the pruned model is faster.
    """
    if pruned <= NOTICEABLY_FASTER * dense:
        return None
    return (
        f"The pruned model is not faster on {device}: a batch of {batch} takes {pruned / dense:.0%} of the dense "
        "model's time. There, narrow blocks cost nearly as much time as whole ones. Plan with budget='latency', which "
        "removes whole blocks. Or serve larger batches or the compiled model."
    )


def slowness(results: Mapping[str, Any]) -> str | None:
    """The warning of [`no_faster`] about the latency that a run measured, or nothing."""
    if "latency_ms" not in results:
        return None
    batch = " x ".join(map(str, results["batch"]))
    return no_faster(**results["latency_ms"], batch=batch, device=results.get("device", "the device of this run"))


def fidelity_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Every figure of how far outputs moved: its label, and the values of the dense and of the pruned model."""
    found = results.get("fidelity") or {}
    known = {name: round(found[name], 4) + 0.0 for name in FIDELITY if name in found}  # No zero with a minus.
    return [(FIDELITY[name][0], f"{FIDELITY[name][1]:.4f}", f"{value:.4f}") for name, value in known.items()]


def recovery_in_words(results: Mapping[str, Any]) -> str | None:
    """What became of the last recovery, if it was watched."""
    watched = results.get("recovery")
    if watched is None:
        return None
    if watched["step"] is None:
        return "The pruned model was trained again. Its best weights were those of an attempt with larger batches."
    if watched["step"] == 0:
        return "The recovery of the pruned model did not help and was undone."
    return (
        f"The pruned model was trained again. Its weights are those of step {watched['step']:,}, which were the best."
    )


def loading_code(loader: str, path: str) -> str:
    """Python that loads a model: `from_pretrained` of its class, or the classes of Sentence Transformers.

    Args:
        loader (`str`): The class with its package, such as `"transformers.BertModel"`.
        path (`str`): Folder or repository.
    """
    package, _, name = loader.rpartition(".")
    method = "" if package == "sentence_transformers" else ".from_pretrained"
    return f'from {package} import {name}\n\nmodel = {name}{method}("{path}")'


def label_of(kind: str) -> str:
    """The label of a kind, or its name where the kind is not registered in this process."""
    return KINDS[kind].label if kind in KINDS else kind


def words_for(kinds: Iterable[str]) -> str:
    """Kinds in words, such as "attention heads and FFN neurons"."""
    return enumerated(map(label_of, kinds))


def enumerated(phrases: Iterable[str]) -> str:
    """Phrases as a list in a sentence: "a, b and c"."""
    listed = list(phrases)
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)


def count_left(groups: Iterable[Group]) -> str:
    """Counts what groups of one kind have left, such as `"3 of 4"`.

    Kinds that are numbered anew after each removal do not know the dense model's count: `"28"`.
    """
    counts = [left_of(group) for group in groups]
    left, dense = sum(left for left, _ in counts), [dense for _, dense in counts if dense is not None]
    return f"{left} of {sum(dense)}" if dense else f"{left}"


def numbering_in_words(groups: Iterable[Group]) -> str:
    """Says how the layers of an encoder-decoder are numbered; `""` for other models."""
    found: dict[str, list[int]] = {"the encoder's": [], "the decoder's": [], "the decoder's cross-attention": []}
    encoder, decoder, cross = found.values()
    for group in groups:
        if not group.kind.outside:
            (cross if group.block != group.layer else decoder if group.decoded else encoder).append(group.layer)
    spans = [f"{min(layers)} to {max(layers)} are {whose}" for whose, layers in found.items() if layers]
    return f"Layers {', '.join(spans)}." if decoder else ""


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
