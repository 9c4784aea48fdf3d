"""`LatencyTable`: how long a layer takes by the heads and neurons it keeps, measured where the model shall run."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..components.groups import attention_blocks, feed_forward_blocks
from ..efficiency import compare_latency
from ..files import write_text
from ..surgery.apply_plan import apply_plan
from ..surgery.plan import PruningPlan


@dataclass
class LatencyTable:
    """Seconds that one layer's blocks take, by the components they keep. Save it, and plan for that device with it.

    Args:
        model_type (`str`): The `config.model_type` of the model it was measured with.
        head_counts (`list[int]`): Numbers of heads a layer, ascending from 0.
        head_seconds (`list[float]`): What one layer's attention takes with so many, beyond what it takes with none.
        neuron_counts (`list[int]`): Numbers of neurons a layer, ascending from 0.
        neuron_seconds (`list[float]`): What one layer's feed-forward block takes with so many, likewise.
        outside (`float`): What a forward pass takes with no heads and no neurons.
        batch (`dict[str, list[int]]`): Shapes of the inputs it was measured with.
    """

    model_type: str
    head_counts: list[int]
    head_seconds: list[float]
    neuron_counts: list[int]
    neuron_seconds: list[float]
    outside: float
    batch: dict[str, list[int]]

    @classmethod
    def measure(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        *,
        points: int = 9,
        repeats: int = 15,
        progress: bool = True,
    ) -> "LatencyTable":
        """Times forward passes of copies of a model with fewer and fewer heads, and of others with fewer neurons.

        All layers get alike smaller, and a layer's time is its share of what the model saves; counts in between are
        interpolated. Measure on the device and with a batch of the shape that the model shall serve.

        Args:
            model (`PreTrainedModel`): The dense model; it is only looked at.
            inputs (`Mapping[str, Any]`): A batch, on the model's device.
            points (`int`, *optional*, defaults to 9): Numbers of heads, and of neurons, to measure at.
            repeats (`int`, *optional*, defaults to 15): Timed passes at each.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

        Raises:
            ValueError: If the layers are not of one size, or the model cannot be pruned.
        """
        heads = [block.num_components for block in attention_blocks(model)]
        neurons = [block.num_components for block in feed_forward_blocks(model)]
        if len({*heads}) != 1 or len({*neurons}) != 1 or points < 2:
            raise ValueError(
                f"A latency table is measured at two or more points on a model whose layers are alike; "
                f"{type(model).__name__} has {heads} heads and {neurons} neurons a layer. Measure the dense model."
            )
        grids = [sorted({round(n * i / (points - 1)) for i in range(points)}) for n in (heads[0], neurons[0])]
        seconds = []
        with tqdm(total=sum(map(len, grids)), desc="Measuring latency", disable=None if progress else True) as bar:
            for kind, grid in zip(("heads", "neurons"), grids, strict=True):
                smaller, times = deepcopy(model), []
                for count in reversed(grid):
                    keep_first(smaller, **{kind: count})
                    times.append(compare_latency({"": smaller}, inputs, repeats)[""])
                    bar.update()
                seconds.append([(time - times[-1]) / len(heads) for time in reversed(times)])
                dense = times[0]
        # More components never take less time but for noise, which would mislead a plan.
        head_seconds, neuron_seconds = (np.maximum.accumulate(values).tolist() for values in seconds)
        outside = max(dense - len(heads) * (head_seconds[-1] + neuron_seconds[-1]), 0.0)
        shapes = {name: list(value.shape) for name, value in inputs.items() if hasattr(value, "shape")}
        return cls(model.config.model_type, grids[0], head_seconds, grids[1], neuron_seconds, outside, shapes)

    def head_cost(self, count: int) -> float:
        """Seconds of one layer's attention with so many heads."""
        return float(np.interp(count, self.head_counts, self.head_seconds))

    def neuron_cost(self, count: int) -> float:
        """Seconds of one layer's feed-forward block with so many neurons."""
        return float(np.interp(count, self.neuron_counts, self.neuron_seconds))

    def validate(self, model: PreTrainedModel, counts: Sequence[int]) -> None:
        """Checks that the table is for models like this one.

        Raises:
            ValueError: If it is of another model type, or does not reach as far as the model's heads and neurons.
        """
        largest = {"heads": self.head_counts[-1], "neurons": self.neuron_counts[-1]}
        layers = len(counts) // 2
        found = {"heads": max(counts[:layers], default=0), "neurons": max(counts[layers:], default=0)}
        if self.model_type != model.config.model_type or largest != found:
            raise ValueError(
                f"The latency table is of a '{self.model_type}' with {largest} a layer, but {type(model).__name__} is "
                f"a '{model.config.model_type}' with {found}. Measure this model, dense, with LatencyTable.measure."
            )

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "LatencyTable":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a latency table.
        """
        try:
            table = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            for counts, seconds in (
                (table.head_counts, table.head_seconds),
                (table.neuron_counts, table.neuron_seconds),
            ):
                rising = len(counts) == len(seconds) > 1 and counts[0] == 0 and sorted(set(counts)) == counts
                if not rising or sorted(seconds) != seconds:
                    raise ValueError("counts and seconds must rise together from 0")
            return table
        except (AttributeError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a latency table: {error!r}") from error


def keep_first(model: PreTrainedModel, heads: int | None = None, neurons: int | None = None) -> None:
    """Cuts every layer of a model down to its first heads, or neurons, in place."""
    gone: dict[str, dict[int, Sequence[int]]] = {"heads": {}, "neurons": {}}
    if heads is not None:
        gone["heads"] = {block.index: block.kept_heads[heads:] for block in attention_blocks(model)}
    if neurons is not None:
        gone["neurons"] = {block.index: range(neurons, block.num_components) for block in feed_forward_blocks(model)}
    apply_plan(model, PruningPlan.for_model(model, heads=gone["heads"], neurons=gone["neurons"]))
