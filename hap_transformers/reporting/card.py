"""The model card of a pruned model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..components.groups import Group, by_kind, find_groups
from ..efficiency import count_parameters
from ..surgery.plan import PruningPlan
from ..version import __version__
from .costs import part_rows
from .wording import (
    COSTS,
    budget_in_words,
    count_left,
    enumerated,
    fidelity_rows,
    loading_code,
    metric_cells,
    metric_names,
    name_of_first,
    numbering_in_words,
    recovery_in_words,
    saved_in_words,
)


TEMPLATE = Path(__file__).with_name("card.md.jinja")
TAGS = ("hap", "pruned", "hap_transformers")
# The Hub's task by the end of the name of the class that loads a model. Cards of others have no `model-index`.
TASKS = {
    "SentenceTransformer": "sentence-similarity",
    "CrossEncoder": "text-ranking",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
}


def make_model_card(
    model: PreTrainedModel,
    *,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    plan: PruningPlan | None = None,
    base_model: str | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
    model_name: str | None = None,
    language: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    pictures: Mapping[str, str] | None = None,
    loader: str | None = None,
) -> ModelCard:
    """Describes a pruned model: what was removed, how, what the model costs now and how to load it.

    Args:
        model (`PreTrainedModel`): The pruned model.
        results (`Mapping[str, Mapping[str, Any]]`, *optional*): Under `metrics`, numbers by phase (`dense`, `pruned`,
            `recovered`), under `intervals` the ends of their intervals. The card's `model-index` has the metrics of
            `recovered`, or else those of `pruned`. Under the names in `COSTS`, numbers for `dense` and `pruned`. Under
            `fidelity`, what [`measure_fidelity`] returned. The card leaves out what is missing.
        plan (`PruningPlan`, *optional*): The last plan. It records how the components were chosen.
        base_model (`str`, *optional*): Name of the model that was fine-tuned.
        dataset (`str` or `Sequence[str]`, *optional*): Name of the data in the text. By default their Hub name.
        dataset_tags (`str` or `Sequence[str]`, *optional*): Hub name of the data.
        dataset_args (`str` or `Sequence[str]`, *optional*): Configuration of the data on the Hub.
        model_name (`str`, *optional*): Name of the pruned model.
        language, license, tags: For the card's metadata.
        pictures (`Mapping[str, str]`, *optional*): Captions and file names of pictures in the card's folder.
        loader (`str`, *optional*): The class that loads the model, with its package, such as
            `"sentence_transformers.SentenceTransformer"`. By default the model's own.

    Returns:
        `ModelCard`: The card; `card.save(path)` writes it.
    """
    results = {"parameters": {"pruned": count_parameters(model)}, **(results or {})}
    metrics, title = results.get("metrics") or {}, model_name or f"pruned {base_model or type(model).__name__}"
    dataset_name, groups = _joined(dataset or dataset_tags), find_groups(model)
    of_sentences = (loader := loader or loader_of(model)).startswith("sentence_transformers.")
    data = ModelCardData(
        library_name="sentence-transformers" if of_sentences else "transformers",
        tags=list(dict.fromkeys([*TAGS, *tags])),
        base_model=base_model,
        datasets=dataset_tags if isinstance(dataset_tags, str) or dataset_tags is None else list(dataset_tags),
        language=language,
        license=license,
        **_evaluation(loader, metrics, title, dataset_name, _joined(dataset_tags), _joined(dataset_args)),
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        loading=loading_code(loader, "PATH_OR_REPO"),
        remote=loader.rpartition(".")[2] if of_sentences else "AutoModel...from_pretrained",
        base_model_name=base_model,
        dataset_name=dataset_name,
        plan=plan,
        budget=budget_in_words(plan.budget) if plan else None,
        left=_left_in_words(groups),
        layers=sorted({group.layer for group in groups}),
        numbering=numbering_in_words(groups),
        counts={
            kind.name: {group.layer: count_left([group]) for group in members}
            for kind, members in by_kind(groups).items()
            if not kind.outside
        },
        parts=part_rows(results),
        saved=saved_in_words(plan) if plan else "",
        vocabulary=results.get("vocabulary"),
        metrics={phase: metric_cells(results, phase) for phase in metrics},
        metric_names=[name.replace("|", "\\|") for name in metric_names(metrics)],
        has_intervals=any(results.get("intervals", {}).get(phase) for phase in metrics),
        fidelity=fidelity_rows(results),
        recovery=recovery_in_words(results),
        first=name_of_first(results),
        costs={label: results[key] for key, label in COSTS.items() if key in results},
        pictures=pictures or {},
        version=__version__,
    )


def _evaluation(
    loader: str,
    metrics: Mapping[str, Mapping[str, float]],
    title: str,
    dataset: str | None,
    dataset_tags: str | None,
    dataset_args: str | None,
) -> dict[str, Any]:
    """The metadata about the task, and the metrics on it where the Hub has a name for it."""
    task = next((task for end, task in TASKS.items() if loader.endswith(end)), None)
    evaluated = metrics_of_pruned(metrics)
    if not task or not evaluated:
        return {"pipeline_tag": task}
    results = [
        EvalResult(task, dataset_tags or "unknown", dataset or "unknown", metric, value, dataset_config=dataset_args)
        for metric, value in evaluated.items()
    ]
    return {"pipeline_tag": task, "model_name": title, "eval_results": results}


def metrics_of_pruned(metrics: Mapping[str, Mapping[str, float]]) -> Mapping[str, float]:
    """The metrics of the pruned model as it is: after its recovery, if it had one."""
    return metrics.get("recovered") or metrics.get("pruned") or {}


def _left_in_words(groups: Sequence[Group]) -> str:
    """What a model has left of each kind, such as "6 of 8 attention heads and 28 FFN neurons"."""
    phrases = []
    for kind, members in by_kind(groups).items():
        linear = sum(group.implant_rank for group in members)
        note = f" ({linear} of them {kind.implant_label})" if linear else ""
        phrases.append(f"{count_left(members)} {kind.label}{note}")
    return enumerated(phrases)


def loader_of(model: PreTrainedModel) -> str:
    """The class to load a model with, and its package: of remote code, the class of Transformers that it extends."""
    shipped = [base.__name__ for base in type(model).__mro__ if base.__module__.startswith("transformers.models.")]
    return f"transformers.{shipped[0]}" if shipped else f"{type(model).__module__}.{type(model).__name__}"


def _joined(names: str | Sequence[str] | None) -> str | None:
    return names if isinstance(names, str) or names is None else ", ".join(names)


def base_model_of(model: PreTrainedModel) -> str | None:
    """The Hub name of what a model was loaded from, or `None` for a folder or a new model."""
    name = model.config.name_or_path
    return name if name and not Path(name).exists() else None
