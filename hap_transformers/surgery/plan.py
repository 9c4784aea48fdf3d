"""`PruningPlan`: what to remove from a model, as data."""

import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..components.groups import AttentionBlock, attention_blocks, feed_forward_blocks
from ..efficiency import count_parameters
from ..files import write_text


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
        implants (`dict[int, int]`, *optional*): Layer number to the rank of the linear map that takes the place of
            removed neurons there; a rank costs what a neuron costs.
        budget (`str`, *optional*): What `ratio` is a share of.
        ratio (`float`, *optional*): Share asked for.
        method (`str`, *optional*): The scoring method behind the plan.
        promise (`dict[str, float]`, *optional*): What the whole model will have and take afterwards: `"parameters"`,
            and where they were asked about `"flops"` and `"latency"` (seconds) of a forward pass. Delete it from a
            plan that you edit.
    """

    heads: dict[int, list[int]]
    model_type: str
    original_heads: list[int]
    neurons: dict[int, list[int]] = field(default_factory=dict)
    num_neurons: list[int] = field(default_factory=list)
    implants: dict[int, int] = field(default_factory=dict)
    budget: str = ""
    ratio: float | None = None
    method: str = ""
    promise: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for kind in ("heads", "neurons"):
            removed = getattr(self, kind)
            numbers = {int(layer): sorted(operator.index(number) for number in own) for layer, own in removed.items()}
            setattr(self, kind, dict(sorted(numbers.items())))
        self.implants = dict(sorted((int(layer), operator.index(rank)) for layer, rank in self.implants.items()))

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        *,
        heads: Mapping[int, Sequence[int]] | None = None,
        neurons: Mapping[int, Sequence[int]] | None = None,
        implants: Mapping[int, int] | None = None,
        **settings: Any,
    ) -> "PruningPlan":
        """A plan for a model as it is now.

        Args:
            model (`PreTrainedModel`): The model; it is only looked at.
            heads, neurons: Layer number to what to remove there.
            implants: Layer number to the rank to put in there.
            settings: `budget`, `ratio`, `method` and `promise`, for the record.

        Raises:
            ValueError: As `validate` does.
        """
        plan = cls(
            heads={layer: list(own) for layer, own in (heads or {}).items()},
            neurons={layer: list(own) for layer, own in (neurons or {}).items()},
            implants=dict(implants or {}),
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
        """Number of parameters that the plan takes from a model, less those of implants.

        Heads already gone count for nothing.

        Raises:
            ValueError: As `validate` does.
        """
        self.validate(model)
        return self._parameters_removed(model)

    def _parameters_removed(self, model: PreTrainedModel) -> int:
        removed = 0
        for block in attention_blocks(model):
            heads = len(set(self.heads.get(block.index, ())) & set(block.kept_heads))
            removed += heads * block.parameters_per_component()
        for ffn in feed_forward_blocks(model):
            fewer = len(self.neurons.get(ffn.index, ())) - self.implants.get(ffn.index, 0)
            removed += fewer * ffn.parameters_per_component()
        return removed

    def validate(self, model: PreTrainedModel) -> None:
        """Checks that the plan fits a model as it is now.

        Raises:
            ValueError: If the plan was made for another model type or shape, names a layer, head or neuron that does
                not exist, or one twice, implants more than it removes, or promises another number of parameters.
        """
        blocks = attention_blocks(model)
        shape = [block.num_original_heads for block in blocks]
        if (self.model_type, self.original_heads) != (model.config.model_type, shape):
            raise ValueError(
                f"The plan is for a '{self.model_type}' with {self.original_heads} heads a layer, but "
                f"{type(model).__name__} is a '{model.config.model_type}' with {shape}. Make a plan for this model."
            )
        counts = [block.num_components for block in feed_forward_blocks(model)]
        if (self.neurons or self.implants) and self.num_neurons != counts:
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
        for layer, rank in self.implants.items():
            if not 0 < rank <= len(self.neurons.get(layer, ())):
                raise ValueError(
                    f"The plan implants rank {rank} in layer {layer}, where it removes "
                    f"{len(self.neurons.get(layer, ()))} neurons; a rank costs what a neuron costs, so it must be "
                    "from 1 to that number. Nothing was pruned."
                )
        parameters = count_parameters(model) - self._parameters_removed(model)
        if parameters != self.promise.get("parameters", parameters):
            raise ValueError(
                f"The plan promises {self.promise['parameters']} parameters, but {type(model).__name__} would have "
                f"{parameters}. If you edited the plan, delete its promise; else make a plan for this model."
            )

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, the heads and the neurons of a layer on a line each."""
        text = json.dumps(asdict(self), indent=2)
        text = re.sub(r"\[[\d\s,]*\]", lambda numbers: " ".join(numbers[0].split()), text)
        write_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a plan.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No pruning plan at '{path}'; `hap plan` or `PruningPlan.save` writes one.")
        try:
            plan = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            for name, kind in (("model_type", str), ("budget", str), ("method", str), ("promise", dict)):
                if not isinstance(getattr(plan, name), kind):
                    raise TypeError(f"{name} must be a {kind.__name__}")
            for name in ("original_heads", "num_neurons"):
                if not isinstance(getattr(plan, name), list) or any(type(n) is not int for n in getattr(plan, name)):
                    raise TypeError(f"{name} must be a list of whole numbers")
            return plan
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a pruning plan: {error!r}") from error


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
