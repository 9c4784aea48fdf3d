"""The model card of a pruned model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..components.groups import attention_blocks, feed_forward_blocks
from ..efficiency import count_parameters
from ..surgery.plan import PruningPlan
from ..version import __version__


TEMPLATE = Path(__file__).with_name("card.md.jinja")
TAGS = ("hap", "pruned", "hap_transformers")
COSTS = {
    "parameters": "parameters",
    "encoder_parameters": "of these in the encoder",
    "flops": "FLOPs, one batch",
    "latency_ms": "latency, one batch, ms",
}
# End of a model class's name to the Hub's name of its task; for any other, the card has no `model-index`.
TASKS = {
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

# What a plan's budget is a share of, in words.
BUDGETS = {
    "params": "the dense encoder's parameters",
    "flops": "the dense encoder's floating point operations",
    "latency": "the dense encoder's time",
    "heads": "all attention heads",
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
) -> ModelCard:
    """Describes a pruned model: what it was, what was removed, what that cost and how to load it.

    Args:
        model (`PreTrainedModel`): The pruned model.
        results (`Mapping[str, Mapping[str, Any]]`, *optional*): Under `metrics`, numbers by phase (`dense`, `pruned`,
            `recovered`), of which those of `recovered`, or else `pruned`, go into the card's `model-index`, too; under
            the names in `COSTS`, numbers for `dense` and `pruned`. Whatever is missing is left out.
        plan (`PruningPlan`, *optional*): What was removed last; tells how it was chosen.
        base_model (`str`, *optional*): Name of the model that was fine-tuned.
        dataset (`str` or `Sequence[str]`, *optional*): What to call the data; by default their name on the Hub.
        dataset_tags (`str` or `Sequence[str]`, *optional*): Name of the data on the Hub.
        dataset_args (`str` or `Sequence[str]`, *optional*): Name of their configuration there.
        model_name (`str`, *optional*): Name of the pruned model.
        language, license, tags: For the card's metadata.
        pictures (`Mapping[str, str]`, *optional*): Caption to file name of pictures beside the card.

    Returns:
        `ModelCard`: The card; `card.save(path)` writes it.
    """
    results = {"parameters": {"pruned": count_parameters(model)}, **(results or {})}
    metrics = results.get("metrics") or {}
    blocks = attention_blocks(model)
    name = model_name or f"pruned {base_model or type(model).__name__}"
    task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
    evaluated = (metrics.get("recovered") or metrics.get("pruned") or {}) if task else {}
    data, tagged = _joined(dataset or dataset_tags), _joined(dataset_tags)
    card_data = ModelCardData(
        library_name="transformers",
        tags=list(dict.fromkeys([*TAGS, *tags])),
        base_model=base_model,
        datasets=dataset_tags if isinstance(dataset_tags, str) or dataset_tags is None else list(dataset_tags),
        language=language,
        license=license,
        pipeline_tag=task,
        model_name=name if evaluated else None,
        eval_results=[
            EvalResult(
                task, tagged or "unknown", data or "unknown", metric, value, dataset_config=_joined(dataset_args)
            )
            for metric, value in evaluated.items()
            if task
        ]
        or None,
    )
    # Remote code subclasses the model's class.
    bases = [base.__name__ for base in type(model).__mro__ if base.__module__.startswith("transformers.")]
    model_class = bases[0] if bases else type(model).__name__
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=name,
        model_class=model_class,
        base_model_name=base_model,
        dataset_name=data,
        plan=plan,
        heads_left=[block.num_components for block in blocks],
        heads=[block.num_original_heads for block in blocks],
        neurons_left=[block.num_components for block in feed_forward_blocks(model)],
        implants=[block.implant_rank for block in feed_forward_blocks(model)],
        budget=BUDGETS.get(plan.budget, plan.budget) if plan else None,
        metrics=metrics,
        metric_names=list(next(iter(metrics.values()), {})),
        costs={label: results[key] for key, label in COSTS.items() if key in results},
        pictures=pictures or {},
        version=__version__,
    )


def _joined(names: str | Sequence[str] | None) -> str | None:
    return names if isinstance(names, str) or names is None else ", ".join(names)


def base_model_of(model: PreTrainedModel) -> str | None:
    """The Hub's name of what a model was loaded from, or `None` if that was a folder, or nothing."""
    name = model.config.name_or_path
    return name if name and not Path(name).exists() else None
