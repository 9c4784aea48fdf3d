"""`LatencyTable`: how long a layer takes by the components it keeps, measured where the model shall run."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..components.forwards import eager_model
from ..components.groups import Group, find_groups
from ..efficiency import evaluating, take_turns
from ..files import read_json, write_text
from ..forward_modes import compiling, device_name, forward_pass, validate_mode
from ..number_fields import validate_whole
from .kinds import kinds_timed_narrower
from .latency_measuring import (
    alike_groups,
    grid,
    of_whole_parts,
    seconds_of_one,
    sets_of,
    shares_between,
    shares_of_fewer,
    shares_of_narrower,
    widths_of,
)


@dataclass
class LatencyTable:
    """Seconds that one layer's groups take, by the components they keep. Save it, and plan for that device with it.

    Args:
        model_type (`str`): The `config.model_type` of the model it was measured with.
        counts (`dict[str, list[int]]`): For each kind of component, numbers of components per layer, ascending from 0.
        seconds (`dict[str, list[float]]`): For each kind, the seconds one layer's group takes with so many, beyond
            what it takes with none. The step from 0 to the next count is what a block costs however narrow it is.
        outside (`float`): Seconds of a forward pass without any components.
        batch (`dict[str, list[int]]`): Shapes of the inputs it was measured with.
        mode (`str`, *optional*, defaults to `"eager"`): How forward passes ran: `"eager"`, `"compiled"` or
            `"cuda_graphs"`.
        precision (`str`, *optional*): `"bf16"` or `"fp16"` for autocast, or the model's own dtype. Older tables do not
            say.
        device (`str`, *optional*): Name of the device. Older tables do not say.
        widths (`dict[str, list[int]]`, *optional*): For a kind whose components can get narrower, such as heads, the
            dimensions that they were measured with, ascending to those of the dense model. Older tables have none.
        shares (`dict[str, list[float]]`, *optional*): For each of these, the seconds of a layer's group over those
            with the dense model's dimensions. They are taken to be the same for all numbers of components.
        sets (`dict[str, list[int]]`, *optional*): For a kind whose layers differ in size, as the stages of
            convolutional networks do: the number of the set of alike layers that each layer is in. Counts and seconds
            of set 2 of `"channels"` have the name `"channels/2"`.
        shared (`dict[str, float]`, *optional*): By the same names, seconds of a layer's group that go with the
            components it reads as well: those of a convolution between two runs of channels. Both groups' seconds have
            them.
    """

    model_type: str
    counts: dict[str, list[int]]
    seconds: dict[str, list[float]]
    outside: float
    batch: dict[str, list[int]]
    mode: str = "eager"
    precision: str = ""
    device: str = ""
    widths: dict[str, list[int]] = field(default_factory=dict)
    shares: dict[str, list[float]] = field(default_factory=dict)
    sets: dict[str, list[int]] = field(default_factory=dict)
    shared: dict[str, float] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        *,
        mode: str = "eager",
        precision: str | None = None,
        points: int = 9,
        repeats: int = 15,
        progress: bool = True,
    ) -> "LatencyTable":
        """Times forward passes of copies of a model with fewer and fewer components, one kind after the other.

        All layers of one size shrink alike, and a layer's time is its share of what the model saves; counts in between
        are interpolated. Once all components of a kind are gone in layers of one size, the next shrink, so the table
        is exact for the dense and for the empty model. Another copy has all heads, which get narrower, where all
        layers have heads of one number and size and none lies in a decoder beside an encoder. The copies take turns
        with the dense model, so a drift of the machine's speed cancels. Measure on the device, in the mode and
        precision, and with a batch of the shape that the model shall serve.

        Args:
            model (`PreTrainedModel`): The dense model; it is only read.
            inputs (`Mapping[str, Any]`): A batch, on the model's device.
            mode (`str`, *optional*, defaults to `"eager"`): `"eager"`, `"compiled"` (`torch.compile`, which compiles
                every copy) or `"cuda_graphs"`.
            precision (`str`, *optional*): `"bf16"` or `"fp16"` for autocast; by default the model's own dtype.
            points (`int`, *optional*, defaults to 9): Evenly spaced numbers of components of each kind to measure at.
                Between them, the next larger width is measured, too, which shows the widths that the device likes;
                and a few small numbers, which show what a narrow block costs.
            repeats (`int`, *optional*, defaults to 15): Timed passes at each.
            progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

        Raises:
            ValueError: If the model has lost components, cannot be pruned, or cannot run in this mode.
        """
        model = eager_model(model)
        validate_mode(mode, model.device)
        if points < 2:
            raise ValueError(f"A latency table is measured at two or more points, got points={points}.")
        validate_whole("repeats", repeats, 1)
        found = alike_groups(model, inputs)
        grids = {alike.key: grid(alike.kind, alike.components, points) for alike in found}
        sets = sets_of(found)
        finer = kinds_timed_narrower(model)
        widths = widths_of(find_groups(model, finer)) if finer else []
        dense: list[float] = []
        total = sum(map(len, grids.values())) - len(grids) + len(widths[:-1])
        total += sum(alike.depth > 0 for alike in found)
        with (
            compiling(mode),
            evaluating(model),
            tqdm(total=total, desc="Measuring latency", disable=None if progress else True) as bar,
        ):
            whole = forward_pass(model, inputs, mode, precision)

            def measured(other: PreTrainedModel) -> float:
                passes = {"dense": whole, "other": forward_pass(other, inputs, mode, precision)}
                seconds = take_turns(passes, repeats)
                dense.extend(seconds["dense"])
                bar.update()
                return float(np.median(np.divide(seconds["other"], seconds["dense"])))

            shares = shares_of_fewer(model, found, grids, measured)
            between = shares_between(model, found, shares, measured)
            narrow = shares_of_narrower(model, finer, widths, measured) if finer else []
        whole_time = float(np.median(dense))
        shared = {alike.key: whole_time * between[alike.key] / len(alike.layers) for alike in found if alike.depth}
        spent = {
            alike.key: seconds_of_one(alike, grids[alike.key], whole_time * np.array(shares[alike.key]), shared)
            for alike in found
        }
        return cls(
            model.config.model_type,
            grids,
            spent,
            whole_time * list(shares.values())[-1][0],
            {name: list(value.shape) for name, value in inputs.items() if hasattr(value, "shape")},
            mode,
            precision or str(model.dtype).removeprefix("torch."),
            device_name(model.device),
            *of_whole_parts(finer, widths, narrow, shares),
            sets,
            shared,
        )

    def key(self, kind: str, layer: int) -> str:
        """What the seconds of a layer's group of a kind are listed under."""
        sets = self.sets.get(kind)
        if sets is None:
            return kind
        return f"{kind}/{sets[layer]}" if layer < len(sets) else f"{kind}/none"

    def cost(self, kind: str, count: int, width: int | None = None, layer: int = 0) -> float:
        """Seconds of one layer's group of a kind with so many components, while those that it reads are whole.

        Args:
            kind (`str`): The kind.
            count (`int`): Components.
            width (`int`, *optional*): Dimensions of each of them; by default those of the dense model.
            layer (`int`, *optional*): The layer, where they differ.
        """
        share = 1.0 if width is None else float(np.interp(width, self.widths[kind], self.shares[kind]))
        key = self.key(kind, layer)
        return share * float(np.interp(count, self.counts[key], self.seconds[key]))

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
            if group.runs is not None:
                whole = group.runs.whole
                if self.widths.get(whole.kind.name, [0])[-1] != whole.head_size:
                    raise ValueError(
                        f"The latency table does not know {whole.kind.name} with fewer than {whole.head_size} "
                        f"dimensions. Measure it again with LatencyTable.measure, or let {whole.kind.name} go whole."
                    )
                group, count = whole, whole.original
            key = self.key(group.kind.name, group.layer)
            found[key] = max(found.get(key, 0), count)
        if self.model_type != model.config.model_type or largest != found:
            raise ValueError(
                f"The latency table is of a '{self.model_type}' with {largest} per layer, but {type(model).__name__} "
                f"is a '{model.config.model_type}' with {found}. Measure this model, dense, with LatencyTable.measure."
            )

    def validate_mode(self, mode: str) -> None:
        """Checks that the table was measured in the mode that a plan is for.

        Raises:
            ValueError: If it was measured in another.
        """
        if mode != self.mode:
            raise ValueError(
                f"The latency table was measured in mode '{self.mode}', but latency_mode is '{mode}'. Set "
                f"latency_mode='{self.mode}', or measure a table with LatencyTable.measure(..., mode='{mode}')."
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
            table = cls(**_by_kind(read_json(path)))
            validate_mode(table.mode)
            times = [table.outside, *table.shared.values(), *chain(*table.seconds.values(), *table.shares.values())]
            if not all(isinstance(time, int | float) and 0 <= time < math.inf for time in times):
                raise ValueError("seconds and shares must be numbers from 0")
            if table.counts.keys() != table.seconds.keys():
                raise ValueError("counts and seconds must be of the same kinds")
            if table.widths.keys() != table.shares.keys() or table.widths.keys() - table.counts.keys():
                raise ValueError("widths and shares must be of the same kinds")
            keys = {f"{kind}/{number}" for kind, numbers in table.sets.items() for number in numbers}
            if not keys | table.shared.keys() <= table.counts.keys():
                raise ValueError("there must be counts and seconds for all sets of layers")
            for kind, counts in table.widths.items():
                if len(counts) != len(table.shares[kind]) or not counts or sorted(set(counts)) != counts:
                    raise ValueError("widths must rise, with a share for each")
            for kind, counts in table.counts.items():
                seconds = table.seconds[kind]
                rising = len(counts) == len(seconds) > 1 and counts[0] == 0 and sorted(set(counts)) == counts
                if not rising or sorted(seconds) != seconds:
                    raise ValueError("counts and seconds must rise together from 0")
            return table
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a latency table: {error!r}") from error


def _by_kind(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved table; the first release wrote heads and neurons under names of their own."""
    if "counts" in values:
        return values
    kinds = {"heads": "head", "neurons": "neuron"}
    counts = {kind: values.pop(f"{name}_counts") for kind, name in kinds.items()}
    seconds = {kind: values.pop(f"{name}_seconds") for kind, name in kinds.items()}
    return {"counts": counts, "seconds": seconds, **values}
