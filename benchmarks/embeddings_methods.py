"""The ways to prune a sentence encoder without labels that are compared."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from glue_scripts.compare_glue.methods import drop_empty_layers, top_layers
from glue_scripts.compare_glue.torch_pruning_plan import torch_pruning_plan
from hap_transformers import PlanningSettings, PruningPlan, SelfLoss, Sensitivity, plan_pruning

from .embeddings_data import Batches


# That of SimCSE (Gao et al., arXiv 2104.08821).
TEMPERATURE = 0.05
# Those that plans have by default for scores that do not foresee the refit.
FLOORS = {"min_heads": 1, "min_neurons": 0.05}


def contrastive_loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """How near every sentence of a batch is to the others, for methods that rank by gradients.

    The self loss has no gradient. This is SimCSE's loss without dropout: both views of a sentence are equal then, so
    that the term that draws them together has no gradient and is left out.
    """
    embedding = SelfLoss().embedding(model, model(**inputs), inputs)
    return _nearness(embedding)


def _nearness(embedding: torch.Tensor) -> torch.Tensor:
    cosines = embedding @ embedding.T / TEMPERATURE
    return cosines.fill_diagonal_(-torch.inf).logsumexp(1).mean()


def by_scores(model: PreTrainedModel, sensitivity: Sensitivity, batches: Batches, ratio: float) -> PruningPlan:
    """Plans by scores, with the floors that the library has for them."""
    return plan_pruning(sensitivity, model, ratio=ratio)


def from_the_top(model: PreTrainedModel, sensitivity: Sensitivity, batches: Batches, ratio: float) -> PruningPlan:
    """Empties layers from the top down; the last one loses only the components of the lowest scores."""
    return _top_layers(model, sensitivity, PlanningSettings(ratio=ratio))


def from_the_top_to_floors(
    model: PreTrainedModel, sensitivity: Sensitivity, batches: Batches, ratio: float
) -> PruningPlan:
    """Empties layers from the top down to the floors, so that the refit has something to work with."""
    return _top_layers(model, sensitivity, PlanningSettings(ratio=ratio, **FLOORS))


def _top_layers(model: PreTrainedModel, sensitivity: Sensitivity, settings: PlanningSettings) -> PruningPlan:
    return top_layers(SimpleNamespace(model=model, hap_config=settings), sensitivity)


def by_torch_pruning(model: PreTrainedModel, sensitivity: Sensitivity, batches: Batches, ratio: float) -> PruningPlan:
    """Plans by Torch-Pruning's Taylor importance on the contrastive loss."""
    with returning_loss(model):
        return torch_pruning_plan(model, batches, ratio)


@contextmanager
def returning_loss(model: PreTrainedModel) -> Iterator[None]:
    """Lets an encoder return its embeddings as logits, and the contrastive loss of them, as a classifier does."""

    def forward(self: PreTrainedModel, **inputs: Any) -> SimpleNamespace:
        embedding = SelfLoss().embedding(self, type(self).forward(self, **inputs), inputs)
        return SimpleNamespace(logits=embedding, loss=_nearness(embedding))

    model.forward = types.MethodType(forward, model)
    try:
        yield
    finally:
        del model.forward


@dataclass
class Method:
    """A way to prune.

    Args:
        score (`str`): The scoring method.
        scoring (`dict[str, Any]`): Arguments of `estimate_sensitivity`.
        plan (`Callable`): Plans from the model, its scores, the batches they are of, and the ratio.
        refit (`bool`): Whether what is left is refitted.
        tuning (`int`): Epochs for which layers are tuned after the refit.
        align (`bool`): Whether heads get the basis in which dimensions are left out.
        finish (`Callable`): Changes the pruned model in the end.
    """

    score: str = "kronecker"
    scoring: dict[str, Any] = field(default_factory=dict)
    plan: Callable[[PreTrainedModel, Sensitivity, Batches, float], PruningPlan] = by_scores
    refit: bool = True
    tuning: int = 0
    align: bool = False
    finish: Callable[[PreTrainedModel], None] = lambda model: None


DEFAULT = "kronecker + refit"
WHOLE_HEADS = "kronecker, whole heads, refit"
TUNED = "kronecker + refit, layers tuned"
_GRADIENT = {"score": "gradient", "scoring": {"loss_fn": contrastive_loss}}

_DIMENSIONS = {"scoring": {"components": ("query_key_dims", "value_dims", "neurons")}, "align": True}

METHODS = {
    DEFAULT: Method(**_DIMENSIONS),
    TUNED: Method(**_DIMENSIONS, tuning=3),
    WHOLE_HEADS: Method(),
    "kronecker, whole heads, no refit": Method(refit=False),
    "fisher, floor and refit": Method("fisher"),
    "relative trace, floor and refit": Method("gauss_newton_trace"),
    "gradient, floor and refit": Method(**_GRADIENT),
    "magnitude, floor and refit": Method("magnitude"),
    "random, floor and refit": Method("random"),
    # Within the one layer that is cut in part, the gradient says what goes, as in the study.
    "top layers, floor and refit": Method(**_GRADIENT, plan=from_the_top_to_floors),
    "top layers dropped": Method(**_GRADIENT, plan=from_the_top, refit=False, finish=drop_empty_layers),
    # Torch-Pruning scores by itself; only the batches count.
    "Torch-Pruning, Taylor, refit": Method("random", plan=by_torch_pruning),
    "Torch-Pruning, Taylor": Method("random", plan=by_torch_pruning, refit=False),
}
