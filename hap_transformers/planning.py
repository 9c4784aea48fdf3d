"""Decides which heads to remove: `plan_pruning` turns a `Sensitivity` into a `PruningPlan`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .blocks import attention_blocks
from .sensitivity import Sensitivity
from .surgery import validate_heads


BUDGETS = ("heads",)


@dataclass
class PruningPlan:
    """What to remove from a model. A plan is data: save it, read it, edit it by hand.

    Args:
        heads (`dict[int, list[int]]`): Layer number to the heads to remove there, numbered as in the original model.
        model_type (`str`): The `config.model_type` the plan was made for.
        original_heads (`list[int]`): Heads of each layer of the original model.
        budget (`str`): What `ratio` is a share of.
        ratio (`float`): Share asked for.
        method (`str`): The scoring method behind the plan.
    """

    heads: dict[int, list[int]]
    model_type: str
    original_heads: list[int]
    budget: str = "heads"
    ratio: float | None = None
    method: str = ""

    @property
    def num_heads(self) -> int:
        """Number of heads the plan removes."""
        return sum(len(heads) for heads in self.heads.values())

    def validate(self, model: PreTrainedModel) -> None:
        """Checks that the plan fits a model.

        Raises:
            ValueError: If the plan was made for another model type or shape, or names a layer or head that does not
                exist, or names a head twice.
        """
        blocks = attention_blocks(model)
        shape = [block.num_original_heads for block in blocks]
        if (self.model_type, self.original_heads) != (model.config.model_type, shape):
            raise ValueError(
                f"The plan is for a '{self.model_type}' with {self.original_heads} heads a layer, but "
                f"{type(model).__name__} is a '{model.config.model_type}' with {shape}. Make a plan for this model."
            )
        for layer, heads in self.heads.items():
            if len(set(heads)) != len(heads):
                raise ValueError(f"The plan names a head of layer {layer} twice: {heads}.")
        validate_heads(blocks, self.heads)

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
            values["heads"] = {int(layer): [int(head) for head in heads] for layer, heads in values["heads"].items()}
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
    return PruningPlan(
        heads={layer: sorted(heads[layer]) for layer in sorted(heads)},
        model_type=model.config.model_type,
        original_heads=[block.num_original_heads for block in blocks],
        budget=budget,
        ratio=ratio,
        method=sensitivity.method,
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
