"""The ways to prune that are compared: the `HapConfig` of each, and how it plans."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hap_transformers import HapConfig, HapTrainer, PruningPlan, Sensitivity, plan_pruning
from hap_transformers.components.groups import find_groups

from .settings import COMPONENTS
from .torch_pruning_plan import torch_pruning_plan


def configured(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """Plans by the trainer's configuration."""
    return trainer.plan(sensitivity)


def same_share(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """Plans without floors. Scores of heads and of neurons cannot be compared, so each loses the same share."""
    config = trainer.hap_config
    return plan_pruning(
        sensitivity, trainer.model, budget=config.budget, ratio=config.ratio, min_heads=0, min_neurons=0
    )


def same_share_normalized(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """Plans the same share, with the neurons' scores of each layer divided by their norm, as those of heads are."""
    neurons = [scores / scores.norm() for scores in sensitivity.neurons]
    return same_share(trainer, replace(sensitivity, scores={**sensitivity.scores, "neurons": neurons}))


def top_layers(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """Empties layers from the top down to the floors; the last one loses only the components of the lowest scores."""
    num_layers = trainer.model.config.num_hidden_layers

    def from_the_top(layers: list[torch.Tensor]) -> list[torch.Tensor]:
        # Ranks within a layer are below a half, the step from layer to layer is 1.
        return [num_layers - i + scores.argsort().argsort() / (2 * len(scores)) for i, scores in enumerate(layers)]

    scores = {kind: from_the_top(layers) for kind, layers in sensitivity.scores.items()}
    by_layer = Sensitivity("top layers", scores=scores, comparable=True, foresees_refit=True)
    config = trainer.hap_config
    floors = {"min_heads": config.min_heads, "min_neurons": config.min_neurons}
    return plan_pruning(by_layer, trainer.model, budget=config.budget, ratio=config.ratio, weigh_costs=False, **floors)


def drop_empty_layers(model: PreTrainedModel) -> None:
    """Removes the layers without heads and neurons; their layer norms would still change the residual stream."""
    kept = sorted({group.layer for group in find_groups(model) if group.num_components})
    encoder = model.base_model.encoder
    encoder.layer = torch.nn.ModuleList(encoder.layer[i] for i in kept)
    model.config.num_hidden_layers = len(kept)


def torch_pruning(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """Plans by Torch-Pruning, on the examples that other methods are scored on."""
    if trainer.hap_config.budget != "params":
        raise ValueError("Torch-Pruning is compared at budget='params' only: it removes heads and neurons.")
    return torch_pruning_plan(trainer.model, trainer.calibration_batches(), trainer.hap_config.ratio)


def nothing(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """Removes nothing; the cell shows what the recovery alone does to the dense model."""
    return PruningPlan.for_model(trainer.model)


@dataclass
class Score:
    """A scoring method, and the kinds that are scored."""

    method: str
    components: list[str]

    @property
    def name(self) -> str:
        """What the files of the scores are named after."""
        return "-".join([self.method, *self.components])


@dataclass
class Method:
    """A way to prune.

    Args:
        config (`dict[str, Any]`): Fields of `HapConfig` that differ from the defaults, other than the ratio.
        plan (`Callable`): Plans from a trainer and the scores of its model by `config`'s method.
        finish (`Callable`): Changes the pruned model before it recovers.
        components (`list[str]`): Kinds that may go.
    """

    config: dict[str, Any] = field(default_factory=dict)
    plan: Callable[[HapTrainer, Sensitivity], PruningPlan] = configured
    finish: Callable[[PreTrainedModel], None] = lambda model: None
    components: list[str] = field(default_factory=lambda: list(COMPONENTS))

    @property
    def score(self) -> Score:
        """How the dense model is scored."""
        return Score(HapConfig(**self.config).method, self.components)


FINER = ["query_key_dims", "value_dims", "neurons"]
PAPER_CONFIG = {
    name: value for name, value in asdict(HapConfig.paper()).items() if value != getattr(HapConfig(), name)
}

# Names that other modules test for.
DEFAULT = "kronecker + refit"
PAPER = "HAP (Yu et al.)"
CONTROL = "nothing removed"
DIMENSIONS = "kronecker + refit, dimensions"
TUNED = "kronecker + refit, dimensions, layers tuned"

METHODS = {
    DEFAULT: Method(),
    DIMENSIONS: Method(components=FINER),
    TUNED: Method({"tuning_epochs": None}, components=FINER),  # All defaults of HapConfig.
    "gradient": Method({"method": "gradient", "refit": False}, same_share),  # As in Michel et al.
    "gradient, neurons normalized": Method({"method": "gradient", "refit": False}, same_share_normalized),
    "gradient, floor and refit": Method({"method": "gradient"}),
    "top layers dropped": Method({"method": "gradient"}, top_layers, drop_empty_layers),
    # The floors that HapConfig has for scores that do not foresee the refit.
    "top layers, floor and refit": Method({"method": "gradient", "min_heads": 1, "min_neurons": 0.05}, top_layers),
    "random": Method({"method": "random", "refit": False}, same_share),
    "kronecker, no refit": Method({"refit": False}),
    "kronecker + refit, no distillation": Method({"distillation": 0.0}),
    "kronecker + refit, implants": Method({"implant_ratio": 0.1}),
    PAPER: Method(PAPER_CONFIG),
    "relative trace, floor and refit": Method({"method": "gauss_newton_trace"}),
    f"{PAPER}, exact trace": Method({**PAPER_CONFIG, "method": "gauss_newton_trace"}),
    "fisher, floor and refit": Method({"method": "fisher"}),
    "magnitude, floor and refit": Method({"method": "magnitude"}),
    "Torch-Pruning, Taylor": Method({"method": "random", "refit": False}, torch_pruning),
    CONTROL: Method({"method": "random", "refit": False, "distillation": 0.0}, nothing),
}
