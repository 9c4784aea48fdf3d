"""The ways to prune that are compared: what each sets in `HapConfig`, and how it plans."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch_pruning_plan import torch_pruning_plan
from transformers import PreTrainedModel

from hap_transformers import HapConfig, HapTrainer, PruningPlan, Sensitivity, plan_pruning
from hap_transformers.components.groups import attention_blocks, feed_forward_blocks


def configured(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """What the trainer's configuration says."""
    return trainer.plan(sensitivity)


def same_share(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """No floors, and the same share of heads and of neurons, for scores of the two that cannot be compared."""
    config = trainer.hap_config
    return plan_pruning(
        sensitivity, trainer.model, budget=config.budget, ratio=config.ratio, min_heads=0, min_neurons=0
    )


def same_share_normalized(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """The same share, neurons' scores divided by the norm of their layer's as the method divides those of heads."""
    neurons = [own / own.norm() for own in sensitivity.neurons]
    return same_share(trainer, replace(sensitivity, neurons=neurons))


def top_layers(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """Empties layers from the top, down to the floors; the last one partly, of what scores lowest."""
    layers = trainer.model.config.num_hidden_layers

    def from_the_top(scores: list[torch.Tensor]) -> list[torch.Tensor]:
        # Ranks within a layer are far smaller than the step from layer to layer.
        return [layers - i + own.argsort().argsort() / (2 * len(own)) for i, own in enumerate(scores)]

    scores = Sensitivity("kronecker", from_the_top(sensitivity.heads), from_the_top(sensitivity.neurons))
    config = trainer.hap_config
    floors = {"min_heads": config.min_heads, "min_neurons": config.min_neurons}
    return plan_pruning(scores, trainer.model, budget=config.budget, ratio=config.ratio, weigh_costs=False, **floors)


def drop_empty_layers(model: PreTrainedModel) -> None:
    """Takes layers out that have neither heads nor neurons left, whose layer norms would still act on what passes."""
    blocks = zip(attention_blocks(model), feed_forward_blocks(model), strict=True)
    kept = [i for i, own in enumerate(blocks) if any(block.num_components for block in own)]
    encoder = model.base_model.encoder
    encoder.layer = torch.nn.ModuleList(encoder.layer[i] for i in kept)
    model.config.num_hidden_layers = len(kept)


def torch_pruning(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """What Torch-Pruning chooses, on the examples that other methods score."""
    if trainer.hap_config.budget != "params":
        raise ValueError("Torch-Pruning is compared at budget='params' only: it removes heads and neurons.")
    batches = [trainer._prepare_inputs(batch) for batch in trainer._refit_batches()]
    return torch_pruning_plan(trainer.model, batches, trainer.hap_config.ratio)


def nothing(trainer: HapTrainer, sensitivity: Sensitivity) -> PruningPlan:
    """Removes nothing: what the recovery alone does to the dense model."""
    return PruningPlan.for_model(trainer.model)


@dataclass
class Method:
    """A way to prune.

    Args:
        config (`dict[str, Any]`): What `HapConfig` says beside the ratio.
        plan (`Callable`): Plans from a trainer and the scores of its model by `config`'s method.
        finish (`Callable`): What is done to the pruned model before it recovers.
    """

    config: dict[str, Any] = field(default_factory=dict)
    plan: Callable[[HapTrainer, Sensitivity], PruningPlan] = configured
    finish: Callable[[PreTrainedModel], None] = lambda model: None

    @property
    def score(self) -> str:
        """The scoring method."""
        return HapConfig(**self.config).method


PAPER = {name: value for name, value in asdict(HapConfig.paper()).items() if value != getattr(HapConfig(), name)}

CONTROL = "nothing removed"
METHODS = {
    "hap": Method(),
    "gradient": Method({"method": "gradient", "refit": False}, same_share),  # As in Michel et al.
    "gradient, neurons normalized": Method({"method": "gradient", "refit": False}, same_share_normalized),
    "gradient, floor and refit": Method({"method": "gradient"}),
    "top layers dropped": Method({"method": "gradient"}, top_layers, drop_empty_layers),
    "top layers, floor and refit": Method({"method": "gradient", "min_heads": 1, "min_neurons": 0.05}, top_layers),
    "random": Method({"method": "random", "refit": False}, same_share),
    "hap without refit": Method({"refit": False}),
    "hap without distillation": Method({"distillation": 0.0}),
    "hap with implants": Method({"implant_ratio": 0.1}),
    "paper": Method(PAPER),
    "relative trace, floor and refit": Method({"method": "gauss_newton_trace"}),
    "paper, exact trace": Method({**PAPER, "method": "gauss_newton_trace"}),
    "fisher, floor and refit": Method({"method": "fisher"}),
    "magnitude, floor and refit": Method({"method": "magnitude"}),
    "Torch-Pruning, Taylor": Method({"method": "random", "refit": False}, torch_pruning),
    CONTROL: Method({"method": "random", "refit": False, "distillation": 0.0}, nothing),
}
