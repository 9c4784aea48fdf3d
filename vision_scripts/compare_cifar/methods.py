"""The ways to prune that are compared: how channels are scored, how they are chosen, and whether there is a refit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from glue_scripts.compare_glue.torch_pruning_plan import loss_gradients, plan_by_gradients
from hap_transformers import HapConfig, PruningPlan, Sensitivity, estimate_sensitivity, plan_pruning

from .data import Batches


# Torch-Pruning is asked for multiples of one over this share, so that it removes hardly more than others.
TAYLOR_STEPS = 1000

Gradients = dict[torch.nn.Parameter, torch.Tensor]


@dataclass(frozen=True)
class Score:
    """How channels are scored. Frozen, so that scores can be kept by it.

    Args:
        method (`str`): One of the library's methods, or `"taylor"` for the gradients that Torch-Pruning ranks by.
        probes (`bool`): Whether it takes the study's number of probes, of few images.
        precision (`str`, *optional*): As for `estimate_sensitivity`.
    """

    method: str = "kronecker"
    probes: bool = False
    precision: str | None = None

    def __call__(self, model: PreTrainedModel, batches: Batches, probes: int, seed: int) -> Any:
        """Scores a model's channels, with as many probes a batch if it takes any."""
        if self.method == "taylor":
            return loss_gradients(model, batches)
        settings = {"num_probes": probes} if self.probes else {}
        return estimate_sensitivity(
            model, batches, self.method, precision=self.precision, seed=seed, progress=False, **settings
        )


def by_scores(model: PreTrainedModel, sensitivity: Sensitivity, batches: Batches, ratio: float) -> PruningPlan:
    """Plans as the library does, with the floors that it has for these scores."""
    return plan_pruning(sensitivity, model, ratio=ratio)


def with_implants(model: PreTrainedModel, sensitivity: Sensitivity, batches: Batches, ratio: float) -> PruningPlan:
    """Plans as the library does, with 1x1 filters for the most sensitive tenth of the filters that go."""
    return plan_pruning(sensitivity, model, ratio=ratio, implant_ratio=0.1)


def as_in_hap(model: PreTrainedModel, sensitivity: Sensitivity, batches: Batches, ratio: float) -> PruningPlan:
    """Plans by one threshold for all layers, each of which keeps 5 % of its channels at least."""
    return plan_pruning(sensitivity, model, HapConfig.paper(ratio=ratio))


def by_torch_pruning(model: PreTrainedModel, gradients: Gradients, batches: Batches, ratio: float) -> PruningPlan:
    """Plans by Torch-Pruning's Taylor importance."""
    example = {"pixel_values": batches[0]["pixel_values"][:1]}
    return plan_by_gradients(model, gradients, example, ratio, TAYLOR_STEPS)


@dataclass(frozen=True)
class Method:
    """A way to prune.

    Args:
        score (`Score`): How channels are scored.
        plan (`Callable`, *optional*): Plans from the dense model, its scores, the batches and the ratio. `None`
            removes nothing.
        refit (`bool`): Whether what is left is refitted.
    """

    score: Score = field(default_factory=Score)
    plan: Callable[[PreTrainedModel, Any, Batches, float], PruningPlan] | None = by_scores
    refit: bool = True


DEFAULT, IMPLANTS = "kronecker + refit", "kronecker + refit, implants"
HAP, EHAP = "HAP's recipe", "EHAP's recipe"
TAYLOR, TAYLOR_REFIT = "Torch-Pruning, Taylor", "Torch-Pruning, Taylor, our refit"
GRADIENT, MAGNITUDE, RANDOM = (f"{name}, floor and refit" for name in ("gradient", "magnitude", "random"))
NOTHING = "nothing removed"

METHODS = {
    DEFAULT: Method(),
    IMPLANTS: Method(plan=with_implants),
    TAYLOR_REFIT: Method(Score("taylor"), by_torch_pruning),
    TAYLOR: Method(Score("taylor"), by_torch_pruning, refit=False),
    MAGNITUDE: Method(Score("magnitude")),
    GRADIENT: Method(Score("gradient")),
    RANDOM: Method(Score("random")),
    HAP: Method(Score("hessian_trace", probes=True), as_in_hap, refit=False),
    EHAP: Method(Score("hessian_trace", probes=True, precision="bf16"), as_in_hap, refit=False),
    NOTHING: Method(plan=None, refit=False),
}
