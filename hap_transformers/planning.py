"""Decides what to remove: `plan_pruning` turns a `Sensitivity` into a `PruningPlan`."""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .blocks import AttentionBlock, attention_blocks, feed_forward_blocks, weights_by_rows
from .sensitivity import Sensitivity


BUDGETS = ("heads",)


@dataclass
class PruningPlan:
    """What to remove from a model. A plan is data: save it, read it, edit it by hand.

    Args:
        heads (`dict[int, list[int]]`): Layer number to the heads to remove there, numbered as in the original model.
            Whatever holds whole numbers is taken, here and for neurons.
        model_type (`str`): The `config.model_type` the plan was made for.
        original_heads (`list[int]`): Heads of each layer of the original model.
        neurons (`dict[int, list[int]]`, *optional*): Layer number to the feed-forward neurons to remove there,
            numbered as they are in the model the plan was made for, pruned before or not.
        num_neurons (`list[int]`, *optional*): Neurons of each layer of that model; needed to remove any.
        budget (`str`): What `ratio` is a share of.
        ratio (`float`): Share asked for.
        method (`str`): The scoring method behind the plan.
    """

    heads: dict[int, list[int]]
    model_type: str
    original_heads: list[int]
    neurons: dict[int, list[int]] = field(default_factory=dict)
    num_neurons: list[int] = field(default_factory=list)
    budget: str = "heads"
    ratio: float | None = None
    method: str = ""

    def __post_init__(self):
        for kind in ("heads", "neurons"):
            removed = getattr(self, kind)
            numbers = {int(layer): sorted(operator.index(number) for number in removed[layer]) for layer in removed}
            setattr(self, kind, dict(sorted(numbers.items())))

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        *,
        heads: Mapping[int, Sequence[int]] | None = None,
        neurons: Mapping[int, Sequence[int]] | None = None,
        **settings: Any,
    ) -> "PruningPlan":
        """A plan for a model as it is now.

        Args:
            model (`PreTrainedModel`): The model; it is only looked at.
            heads, neurons: Layer number to what to remove there.
            settings: `budget`, `ratio` and `method`, for the record.

        Raises:
            ValueError: As `validate` does.
        """
        plan = cls(
            heads=dict(heads or {}),
            neurons=dict(neurons or {}),
            model_type=model.config.model_type,
            original_heads=[block.num_original_heads for block in attention_blocks(model)],
            num_neurons=[block.num_components for block in feed_forward_blocks(model)],
            **settings,
        )
        plan.validate(model)
        return plan

    @property
    def num_heads(self) -> int:
        """Number of heads the plan removes."""
        return sum(len(heads) for heads in self.heads.values())

    def count_parameters(self, model: PreTrainedModel) -> int:
        """Number of parameters that the plan takes from a model. Heads already gone count for nothing.

        Raises:
            ValueError: As `validate` does.
        """
        self.validate(model)
        removed = 0
        for block in attention_blocks(model):
            heads = len(set(self.heads.get(block.index, ())) & set(block.kept_heads))
            positions = sum(weights_by_rows(p) for p in block.position_inputs) // max(block.num_components, 1)
            removed += heads * (block.weights_per_component() + positions)
        for block in feed_forward_blocks(model):
            removed += len(self.neurons.get(block.index, ())) * block.weights_per_component()
        return removed

    def validate(self, model: PreTrainedModel) -> None:
        """Checks that the plan fits a model as it is now.

        Raises:
            ValueError: If the plan was made for another model type or shape, or names a layer, head or neuron that
                does not exist, or one twice.
        """
        blocks = attention_blocks(model)
        shape = [block.num_original_heads for block in blocks]
        if (self.model_type, self.original_heads) != (model.config.model_type, shape):
            raise ValueError(
                f"The plan is for a '{self.model_type}' with {self.original_heads} heads a layer, but "
                f"{type(model).__name__} is a '{model.config.model_type}' with {shape}. Make a plan for this model."
            )
        counts = [block.num_components for block in feed_forward_blocks(model)]
        if self.neurons and self.num_neurons != counts:
            raise ValueError(
                f"The plan is for {self.num_neurons} neurons a layer, but {type(model).__name__} has {counts}. Make a "
                "plan for this model as it is now."
            )
        for kind, removed in (("head", self.heads), ("neuron", self.neurons)):
            for layer, numbers in removed.items():
                if len(set(numbers)) != len(numbers):
                    raise ValueError(f"The plan names a {kind} of layer {layer} twice: {sorted(numbers)}.")
        validate_heads(blocks, self.heads)
        _validate_numbers("neurons", counts, self.neurons, "in the model as it is now")

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a plan.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a pruning plan: {error!r}") from error


def plan_pruning(
    sensitivity: Sensitivity,
    model: PreTrainedModel,
    *,
    budget: str = "heads",
    ratio: float = 0.4,
    min_heads: int = 1,
) -> PruningPlan:
    """Chooses the least sensitive heads of the whole model, down to a floor in each layer.

    All heads are ranked together, as in [HAP](https://arxiv.org/abs/2101.08940). The floor is not in the paper:
    without it a one-shot ranking can empty whole layers.

    Args:
        sensitivity (`Sensitivity`): Scores of the heads `model` has now.
        model (`PreTrainedModel`): The model to plan for; it is only looked at.
        budget (`str`, *optional*, defaults to `"heads"`): What `ratio` is a share of. `"heads"`: the original model's
            heads.
        ratio (`float`, *optional*, defaults to 0.4): Share to be gone afterwards, in [0, 1). Heads pruned earlier
            count. The number of heads is rounded to the nearest.
        min_heads (`int`, *optional*, defaults to 1): Heads every layer keeps at least.

    Returns:
        `PruningPlan`: The heads to remove, in original numbers.

    Raises:
        ValueError: If `ratio` is outside [0, 1), `budget` is unknown, the scores are not finite or do not fit the
            model, or the floor stands in the way of the ratio.
    """
    validate_budget(budget, ratio, min_heads)
    blocks = attention_blocks(model)
    if sensitivity.heads is None:
        raise ValueError("The sensitivity has no scores of heads; estimate it with components=('heads', ...).")
    found = [len(scores) for scores in sensitivity.heads]
    if found != [block.num_heads for block in blocks]:
        raise ValueError(
            f"The sensitivity has scores for {found} heads a layer, the model has "
            f"{[block.num_heads for block in blocks]}. Estimate the sensitivity of this model as it is now."
        )
    for layer, scores in enumerate(sensitivity.heads):
        if not torch.isfinite(scores).all():
            raise ValueError(
                f"Layer {layer} has scores that are not finite: {scores.tolist()}. Cannot rank its heads."
            )
    total = sum(block.num_original_heads for block in blocks)
    to_remove = round(ratio * total) - sum(block.num_original_heads - block.num_heads for block in blocks)
    removable = sum(max(block.num_heads - min_heads, 0) for block in blocks)
    if to_remove > removable:
        raise ValueError(
            f"ratio={ratio} asks for {to_remove} more heads to go, but min_heads={min_heads} lets only {removable} of "
            f"{sum(block.num_heads for block in blocks)} go. Lower ratio or min_heads."
        )
    ranking = sorted(
        (float(score), block.index, head)
        for block, scores in zip(blocks, sensitivity.heads, strict=True)
        for head, score in zip(block.kept_heads, scores, strict=True)
    )
    left = {block.index: block.num_heads for block in blocks}
    heads: dict[int, list[int]] = {}
    for _, layer, head in ranking:
        if to_remove <= 0:
            break
        if left[layer] > min_heads:
            heads.setdefault(layer, []).append(head)
            left[layer] -= 1
            to_remove -= 1
    return PruningPlan.for_model(model, heads=heads, budget=budget, ratio=ratio, method=sensitivity.method)


def validate_heads(blocks: list[AttentionBlock], heads_to_prune: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """Checks that every named layer and head exists in the original model.

    Returns:
        `dict[int, list[int]]`: The same removals with sorted, plain integers.

    Raises:
        ValueError: If a layer or head is out of range.
    """
    totals = [block.num_original_heads for block in blocks]
    _validate_numbers("heads", totals, heads_to_prune, "in the original model")
    return {int(layer): sorted({operator.index(head) for head in heads}) for layer, heads in heads_to_prune.items()}


def _validate_numbers(kind: str, totals: list[int], removed: Mapping[int, Sequence[int]], where: str) -> None:
    for layer, numbers in removed.items():
        if not 0 <= int(layer) < len(totals):
            raise ValueError(
                f"Cannot prune {kind} of layer {layer}: the model has layers 0 to {len(totals) - 1}. "
                "Nothing was pruned."
            )
        wrong = [number for number in numbers if not 0 <= number < totals[int(layer)]]
        if wrong:
            raise ValueError(
                f"Cannot prune {kind} {wrong} of layer {layer}: they are numbered 0 to {totals[int(layer)] - 1}, as "
                f"{where}. Nothing was pruned."
            )


def validate_budget(budget: str, ratio: float, min_heads: int) -> None:
    """Checks what a plan can be asked for, without a model.

    Raises:
        ValueError: If `budget` is unknown, `ratio` is outside [0, 1) or `min_heads` is negative.
    """
    if budget not in BUDGETS:
        raise ValueError(f"Unknown budget '{budget}'; choose one of {', '.join(BUDGETS)}.")
    if not 0 <= ratio < 1:
        raise ValueError(f"`ratio` is the share to remove and must be in [0, 1), got {ratio}.")
    if min_heads < 0:
        raise ValueError(f"`min_heads` must not be negative, got {min_heads}.")
