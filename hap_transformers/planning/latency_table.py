"""`LatencyTable`: how long a layer takes by the components it keeps, measured where the model shall run."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..components.groups import Group, Kind, by_kind, find_groups
from ..efficiency import compare_latency
from ..files import write_text
from ..surgery.apply_plan import apply_plan
from ..surgery.plan import PruningPlan


@dataclass
class LatencyTable:
    """Seconds that one layer's groups take, by the components they keep. Save it, and plan for that device with it.

    Args:
        model_type (`str`): The `config.model_type` of the model it was measured with.
        counts (`dict[str, list[int]]`): For each kind of component, numbers of components per layer, ascending from 0.
        seconds (`dict[str, list[float]]`): For each kind, the seconds one layer's group takes with so many, beyond
            what it takes with none.
        outside (`float`): Seconds of a forward pass without any components.
        batch (`dict[str, list[int]]`): Shapes of the inputs it was measured with.
    """

    model_type: str
    counts: dict[str, list[int]]
    seconds: dict[str, list[float]]
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
        """Times forward passes of copies of a model with fewer and fewer components of one kind after the other.

        All layers shrink alike, and a layer's time is its share of what the model saves; counts in between are
        interpolated. Measure on the device and with a batch of the shape that the model shall serve.

        Args:
            model (`PreTrainedModel`): The dense model; it is only read.
            inputs (`Mapping[str, Any]`): A batch, on the model's device.
            points (`int`, *optional*, defaults to 9): Numbers of components of each kind to measure at.
            repeats (`int`, *optional*, defaults to 15): Timed passes at each.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

        Raises:
            ValueError: If the layers are not of one size, or the model cannot be pruned.
        """
        found = by_kind(find_groups(model))
        sizes = {kind.name: [group.num_components for group in groups] for kind, groups in found.items()}
        if any(len(set(counts)) != 1 for counts in sizes.values()) or points < 2:
            raise ValueError(
                f"A latency table is measured at two or more points on a model whose layers are alike; "
                f"{type(model).__name__} has, per layer, {sizes}. Measure the dense model."
            )
        grids = {
            kind: sorted({round(counts[0] * i / (points - 1)) for i in range(points)})
            for kind, counts in sizes.items()
        }
        seconds: dict[str, list[float]] = {}
        total = sum(map(len, grids.values()))
        with tqdm(total=total, desc="Measuring latency", disable=None if progress else True) as bar:
            for kind in found:
                smaller, times = deepcopy(model), []
                for count in reversed(grids[kind.name]):
                    keep_first(smaller, kind, count)
                    times.append(compare_latency({"": smaller}, inputs, repeats)[""])
                    bar.update()
                spent = [(time - times[-1]) / len(sizes[kind.name]) for time in reversed(times)]
                # More components never take less time but for noise, which would mislead a plan.
                seconds[kind.name] = np.maximum.accumulate(spent).tolist()
                dense = times[0]
        outside = max(dense - sum(len(sizes[kind]) * spent[-1] for kind, spent in seconds.items()), 0.0)
        shapes = {name: list(value.shape) for name, value in inputs.items() if hasattr(value, "shape")}
        return cls(model.config.model_type, grids, seconds, outside, shapes)

    def cost(self, kind: str, count: int) -> float:
        """Seconds of one layer's group of a kind with so many components."""
        return float(np.interp(count, self.counts[kind], self.seconds[kind]))

    def validate(self, model: PreTrainedModel, groups: Sequence[Group], counts: Sequence[int]) -> None:
        """Checks that the table is for models like this one.

        Args:
            model (`PreTrainedModel`): The model.
            groups (`Sequence[Group]`): All its groups.
            counts (`Sequence[int]`): Components that each group has in the dense model.

        Raises:
            ValueError: If it is of another model type, or does not reach as far as the model's components.
        """
        largest = {kind: counts[-1] for kind, counts in self.counts.items()}
        found: dict[str, int] = {}
        for group, count in zip(groups, counts, strict=True):
            found[group.kind.name] = max(found.get(group.kind.name, 0), count)
        if self.model_type != model.config.model_type or largest != found:
            raise ValueError(
                f"The latency table is of a '{self.model_type}' with {largest} per layer, but {type(model).__name__} "
                f"is a '{model.config.model_type}' with {found}. Measure this model, dense, with LatencyTable.measure."
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
            table = cls(**_by_kind(json.loads(Path(path).read_text(encoding="utf-8"))))
            if table.counts.keys() != table.seconds.keys():
                raise ValueError("counts and seconds must be of the same kinds")
            for kind, counts in table.counts.items():
                seconds = table.seconds[kind]
                rising = len(counts) == len(seconds) > 1 and counts[0] == 0 and sorted(set(counts)) == counts
                if not rising or sorted(seconds) != seconds:
                    raise ValueError("counts and seconds must rise together from 0")
            return table
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a latency table: {error!r}") from error


def keep_first(model: PreTrainedModel, kind: Kind, count: int) -> None:
    """Cuts every layer of a model down to its first components of a kind, in place."""
    groups = find_groups(model, [kind.name])
    removed = {group.layer: list(group.kept[count:]) for group in groups}
    apply_plan(model, PruningPlan.for_model(model, **{kind.name: removed}))  # type: ignore[arg-type]


def _by_kind(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved table; the first release wrote heads and neurons under names of their own."""
    if "counts" in values:
        return values
    kinds = {"heads": "head", "neurons": "neuron"}
    counts = {kind: values.pop(f"{name}_counts") for kind, name in kinds.items()}
    seconds = {kind: values.pop(f"{name}_seconds") for kind, name in kinds.items()}
    return {"counts": counts, "seconds": seconds, **values}
