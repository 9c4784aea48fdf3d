"""The model card of a pruned model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .planning import PruningPlan
from .version import __version__


TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def make_model_card(
    plan: PruningPlan, *, base_model: str, task: str, results: Mapping[str, Any], picture: str | None = None
) -> ModelCard:
    """Describes a pruned model: what it was, what was removed, what that cost and how to load it.

    Args:
        plan (`PruningPlan`): What was removed.
        base_model (`str`): Name of the model that was fine-tuned.
        task (`str`): The task's name.
        results (`Mapping[str, Any]`): `metrics` by phase (`dense`, `pruned`, `recovered`), and `parameters`, `flops`
            and `latency_ms`, each `dense` and `pruned`.
        picture (`str`, *optional*): File name of the sensitivity picture, beside the card.

    Returns:
        `ModelCard`: The card; `card.save(path)` writes it.
    """
    left = [total - len(plan.heads.get(layer, ())) for layer, total in enumerate(plan.original_heads)]
    return ModelCard.from_template(
        ModelCardData(library_name="transformers", tags=["hap", "pruned", "hap_transformers"]),
        template_path=str(TEMPLATE),
        base_model_name=base_model,
        task=task,
        plan=plan,
        heads_left=left,
        results=results,
        metric_names=list(results["metrics"]["dense"]),
        picture=picture,
        version=__version__,
    )
