"""`LatencyTable`: how long a layer takes by the components it keeps, measured where the model shall run."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..components.forwards import eager_copy, eager_model
from ..components.groups import KINDS, Group, Kind, by_kind, find_groups
from ..efficiency import evaluating, take_turns
from ..files import write_text
from ..forward_modes import compiling, device_name, forward_pass, validate_mode
from ..surgery.apply_plan import apply_plan
from ..surgery.plan import PruningPlan
from .kinds import narrowing_kinds
from .settings import finest_step


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

        All layers shrink alike, and a layer's time is its share of what the model saves; counts in between are
        interpolated. Once all components of a kind are gone, the next kind shrinks, so the table is exact for the
        dense and for the empty model. Another copy has all heads, which get narrower. The copies take turns with the
        dense model, so a drift of the machine's speed cancels. Measure on the device, in the mode and precision, and
        with a batch of the shape that the model shall serve.

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
            ValueError: If the layers are not of one size, the model cannot be pruned, or it cannot run in this mode.
        """
        model = eager_model(model)
        validate_mode(mode, model.device)
        found = _alike(model)
        if points < 2:
            raise ValueError(f"A latency table is measured at two or more points, got points={points}.")
        grids = {kind.name: _grid(kind, groups[0].num_components, points) for kind, groups in found.items()}
        finer = narrowing_kinds(model)
        widths = _widths(find_groups(model, finer)) if finer else []
        dense: list[float] = []
        total = sum(map(len, grids.values())) - len(grids) + len(widths[:-1])
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

            shares = _shares_of_fewer(model, found, grids, measured)
            narrow = _shares_of_narrower(model, finer, widths, measured) if finer else []
        whole_time = float(np.median(dense))
        spent = {
            kind: _rising(whole_time * (np.array(ratios) - ratios[0]) / len(groups)).tolist()
            for (kind, ratios), groups in zip(shares.items(), found.values(), strict=True)
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
            *_of_whole_parts(finer, widths, narrow, shares),
        )

    def cost(self, kind: str, count: int, width: int | None = None) -> float:
        """Seconds of one layer's group of a kind with so many components.

        Args:
            kind (`str`): The kind.
            count (`int`): Components.
            width (`int`, *optional*): Dimensions of each of them; by default those of the dense model.
        """
        share = 1.0 if width is None else float(np.interp(width, self.widths[kind], self.shares[kind]))
        return share * float(np.interp(count, self.counts[kind], self.seconds[kind]))

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
            found[group.kind.name] = max(found.get(group.kind.name, 0), count)
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
            table = cls(**_by_kind(json.loads(Path(path).read_text(encoding="utf-8"))))
            validate_mode(table.mode)
            if table.counts.keys() != table.seconds.keys():
                raise ValueError("counts and seconds must be of the same kinds")
            if table.widths.keys() != table.shares.keys() or table.widths.keys() - table.counts.keys():
                raise ValueError("widths and shares must be of the same kinds")
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


def _grid(kind: Kind, dense: int, points: int) -> list[int]:
    """Numbers of components to measure at: evenly spaced ones, the next larger widths, and a few small ones."""
    step = kind.step
    even = [step * round(dense * place / (points - 1) / step) for place in range(points - 1)]
    small = [1, step, step * math.ceil(0.02 * dense / step)]
    beside = [count + step for count in even[1:]]
    return sorted({count for count in (*even, *small, *beside) if count < dense} | {dense})


def _rising(seconds: np.ndarray) -> np.ndarray:
    """Seconds that never fall, from 0: more components never take less time but for noise, which misleads plans."""
    highest_before = np.maximum.accumulate(seconds)
    lowest_after = np.minimum.accumulate(seconds[::-1])[::-1]
    middle = (highest_before + lowest_after) / 2
    return middle - middle[0]


def validate_measurable(model: PreTrainedModel) -> None:
    """Checks that a table can be measured with a model.

    Raises:
        ValueError: If its layers are not alike.
    """
    _alike(eager_model(model))


def _alike(model: PreTrainedModel) -> dict[Kind, list[Group]]:
    """The groups of a model whose layers are alike, by kind."""
    found = by_kind(group for group in find_groups(model) if not group.kind.outside)
    sizes = {kind.name: [group.num_components for group in groups] for kind, groups in found.items()}
    if any(len(set(counts)) != 1 for counts in sizes.values()) or any(kind.instead_of for kind in found):
        raise ValueError(
            f"A latency table is measured on a model whose layers are alike and whole; {type(model).__name__} has, "
            f"per layer, {sizes}. Measure the dense model."
        )
    return found


def _widths(groups: Sequence[Group]) -> list[int]:
    """A few widths to measure at: multiples that suit kernels, and that of the dense model."""
    runs = next(group.runs for group in groups if group.runs is not None)
    dense = runs.whole.head_size
    step = finest_step(groups[0].kind.step, dense)
    wider = max(step, step * math.ceil(dense / step / 4))
    return sorted({step, *range(wider, dense, wider), dense})


def _shares_of_fewer(
    model: PreTrainedModel,
    kinds: Iterable[Kind],
    grids: Mapping[str, list[int]],
    measured: Callable[[PreTrainedModel], float],
) -> dict[str, list[float]]:
    """For every kind and number of components, the share of the dense time, once the kinds before are gone."""
    smaller, share, shares = eager_copy(model).eval(), 1.0, dict[str, list[float]]()
    for kind in kinds:
        shares[kind.name] = [share]
        for count in reversed(grids[kind.name][:-1]):
            keep_first(smaller, kind, count)
            share = measured(smaller)
            shares[kind.name].insert(0, share)
    return shares


def _shares_of_narrower(
    model: PreTrainedModel, finer: Sequence[str], widths: Sequence[int], measured: Callable[[PreTrainedModel], float]
) -> list[float]:
    """For every width, the share of the dense model's time."""
    narrower, shares = eager_copy(model).eval(), [1.0]
    for width in reversed(widths[:-1]):
        keep_first_of_parts(narrower, finer, width)
        shares.insert(0, measured(narrower))
    return shares


def _of_whole_parts(
    finer: Sequence[str], widths: list[int], passes: list[float], shares: Mapping[str, list[float]]
) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """For each width, the share of a group's seconds, from the shares of whole passes."""
    if not finer:
        return {}, {}
    whole = KINDS[finer[0]].instead_of
    assert whole is not None  # It has finer kinds.
    spent = max(shares[whole][-1] - shares[whole][0], np.finfo(float).tiny)
    left = _rising(np.clip([1 - (1 - share) / spent for share in passes], 0, 1)) if len(passes) > 1 else np.ones(1)
    return {whole: widths}, {whole: (1 - (left[-1] - left)).tolist()}


def keep_first_of_parts(model: PreTrainedModel, kinds: Sequence[str], width: int) -> None:
    """Cuts all parts of every layer of a model down to their first components, in place."""
    removed: dict[str, dict[int, list[int]]] = {kind: {} for kind in kinds}
    for group in find_groups(model, kinds):
        if group.runs is not None:
            ends = zip(accumulate(group.runs.left), group.runs.left, strict=True)
            gone = [range(end - max(left - width, 0), end) for end, left in ends]
            removed[group.kind.name][group.layer] = [position for run in gone for position in run]
    apply_plan(model, PruningPlan.for_model(model, **removed))  # type: ignore[arg-type]


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
