"""Decides what to remove: `plan_pruning` turns a `Sensitivity` into a `PruningPlan`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..components.groups import AttentionBlock, Block
from ..sensitivity import COMPARABLE_METHODS, Sensitivity
from ..surgery.plan import PruningPlan
from .budgets import BUDGETS, Budget, all_blocks, dense_counts, make_budget
from .latency_table import LatencyTable


# Share of the rank of an implant in the neurons that it takes the place of.
IMPLANT_RANK = 0.5


def plan_pruning(
    sensitivity: Sensitivity,
    model: PreTrainedModel,
    *,
    budget: str = "params",
    ratio: float = 0.6,
    min_heads: int | None = None,
    min_neurons: float | None = None,
    neuron_multiple: int = 8,
    weigh_costs: bool = True,
    implant_ratio: float = 0.0,
    inputs: Mapping[str, Any] | None = None,
    latency_table: LatencyTable | None = None,
) -> PruningPlan:
    """Chooses the heads and neurons whose removal costs least accuracy for what it saves.

    Heads and neurons of all layers are ranked together by score over cost, and removed from the lowest up until the
    budget is met. Scores that cannot be compared between heads and neurons (`"gradient"`, `"magnitude"`, `"random"`)
    are ranked apart, and the same share of either goes.

    Parameters that control how much is removed:
        sensitivity (`Sensitivity`): Scores of the heads and neurons that `model` has now.
        model (`PreTrainedModel`): The model to plan for; it is only looked at.
        budget (`str`, *optional*, defaults to `"params"`): What `ratio` is a share of, always of the dense model:

            - `"params"`: parameters of the encoder's layers;
            - `"flops"`: their FLOPs on `inputs`;
            - `"latency"`: their seconds by `latency_table`;
            - `"heads"`: heads; only these are removed, their number is rounded to the nearest.
        ratio (`float`, *optional*, defaults to 0.6): Share to be gone afterwards, in [0, 1). What was pruned earlier
            counts. Somewhat more goes, where heads and groups of neurons do not fit exactly.
        inputs (`Mapping[str, Any]`, *optional*): A batch of the length that the model shall serve. With it, the plan
            promises FLOPs.
        latency_table (`LatencyTable`, *optional*): Seconds measured on the device that the model shall run on. With
            it, the plan promises a latency.

    Parameters that control what may go:
        min_heads (`int`, *optional*): Heads every layer keeps at least. By default 1, and 0 for `"kronecker"`, which
            foresees when a layer cannot spare more; the other scores can empty whole layers.
        min_neurons (`float`, *optional*): Share of its dense neurons that every layer keeps at least. By default 0.05,
            and 0 for `"kronecker"`. Where the floor is 0, whole blocks can go.
        neuron_multiple (`int`, *optional*, defaults to 8): Layers that lose neurons keep a multiple of this, which
            matrix products like.
        weigh_costs (`bool`, *optional*, defaults to `True`): Whether to rank by score over cost, or by score alone.
        implant_ratio (`float`, *optional*, defaults to 0.0): Share of the neurons that would go, the most sensitive
            of them, whose blocks get a low-rank linear map ([HAP](https://arxiv.org/abs/2101.08940)) of half as many
            ranks. A rank costs what a neuron costs, and as many more neurons go to pay for it.

    Returns:
        `PruningPlan`: The heads (original numbers) and neurons to remove, and what the model will cost then.

    Raises:
        ValueError: If a number is out of range, the budget is unknown or lacks `inputs` or `latency_table`, the scores
            are not finite or do not fit the model, or a floor stands in the way of the ratio.
    """
    validate_planning(budget, ratio, min_heads, min_neurons, neuron_multiple, implant_ratio)
    foresees = sensitivity.method == "kronecker"
    min_heads = (0 if foresees else 1) if min_heads is None else min_heads
    min_neurons = (0.0 if foresees else 0.05) if min_neurons is None else min_neurons
    blocks = all_blocks(model)
    scores = _block_scores(sensitivity, blocks, kinds=("heads",) if budget == "heads" else ("heads", "neurons"))
    currency = make_budget(budget, model, inputs, latency_table)
    to_save = currency.now - (1 - ratio) * currency.dense
    if budget == "heads":
        to_save = round(to_save)
    floors = [
        min_heads if isinstance(block, AttentionBlock) else math.ceil(min_neurons * count)
        for block, count in zip(blocks, dense_counts(model), strict=True)
    ]
    units = [
        unit
        for i in range(len(blocks))
        if i in scores
        for unit in _units(i, blocks[i], scores[i], floors[i], currency, neuron_multiple, weigh_costs)
    ]
    most = sum(unit.saves for unit in units)
    slack = 1e-9 * currency.dense
    if to_save > most + slack:
        reachable = 1 - (currency.now - most) / currency.dense
        raise ValueError(
            f"ratio={ratio} of budget='{budget}' cannot be met: with min_heads={min_heads} and "
            f"min_neurons={min_neurons} at most {math.floor(1000 * reachable) / 1000} can go, the rest are floors and "
            "weights that belong to no head or neuron. Lower ratio or the floors."
        )
    kinds = [units]
    if sensitivity.method not in COMPARABLE_METHODS:
        kinds = [[u for u in units if isinstance(blocks[u.block], AttentionBlock) == heads] for heads in (True, False)]
    removed: list[_Unit] = []
    implants: dict[int, int] = {}
    for kind in kinds:
        share = sum(unit.saves for unit in kind) / most if most else 0.0
        own, own_implants = _cheapest(kind, share * to_save - slack, blocks, currency, implant_ratio, neuron_multiple)
        removed += own
        implants |= own_implants
    heads: dict[int, list[int]] = {}
    neurons: dict[int, list[int]] = {}
    for unit in removed:
        block = blocks[unit.block]
        if isinstance(block, AttentionBlock):
            heads.setdefault(block.index, []).extend(block.kept_heads[i] for i in unit.components)
        else:
            neurons.setdefault(block.index, []).extend(unit.components)
    plan = PruningPlan.for_model(
        model,
        heads=heads,
        neurons=neurons,
        implants=implants,
        budget=budget,
        ratio=ratio,
        method=sensitivity.method,
    )
    plan.promise = _promise(plan, model, inputs, latency_table)
    return plan


@dataclass
class _Unit:
    """Components of a block that go together.

    Args:
        block (`int`): Which of `all_blocks`.
        place (`int`): Its place in the block's order of removal.
        components (`list[int]`): Positions of the components.
        score (`float`): What it is ranked by.
        saves (`float`): What its removal saves after those before it.
    """

    block: int
    place: int
    components: list[int]
    score: float
    saves: float


def _block_scores(
    sensitivity: Sensitivity, blocks: Sequence[Block], kinds: Sequence[str]
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """For every block of the kinds that can go, its scores and its components in the order of removal."""
    found = {}
    for kind in kinds:
        own = [i for i, block in enumerate(blocks) if isinstance(block, AttentionBlock) == (kind == "heads")]
        layers = getattr(sensitivity, kind)
        if layers is None:
            raise ValueError(f"The sensitivity has no scores of {kind}; estimate it with components=('{kind}', ...).")
        counts = [blocks[i].num_components for i in own]
        if [len(scores) for scores in layers] != counts:
            raise ValueError(
                f"The sensitivity has scores for {[len(scores) for scores in layers]} {kind} a layer, the model has "
                f"{counts}. Estimate the sensitivity of this model as it is now."
            )
        places = getattr(sensitivity, f"{kind.removesuffix('s')}_order")
        for layer, (i, scores) in enumerate(zip(own, layers, strict=True)):
            if not torch.isfinite(scores).all():
                raise ValueError(
                    f"Layer {layer} has scores of {kind} that are not finite. Cannot rank them; estimate them again."
                )
            found[i] = scores, torch.argsort(scores if places is None else places[layer], stable=True)
    return found


def _units(
    number: int,
    block: Block,
    scores: tuple[torch.Tensor, torch.Tensor],
    floor: int,
    currency: Budget,
    multiple: int,
    weigh_costs: bool,
) -> list[_Unit]:
    """What can go from a block, first unit first: heads one by one, neurons in groups that leave multiples."""
    values, order = scores
    count, cost = block.num_components, currency.costs[number]
    if not count:
        return []
    step = 1 if isinstance(block, AttentionBlock) else multiple
    # A block's own average, so that units keep their order.
    weight = max((cost(count) - cost(0)) / count, torch.finfo(torch.float64).tiny) if weigh_costs else 1.0
    units: list[_Unit] = []
    gone = 0
    while gone < count:
        size = (count - gone) % step or step
        if count - gone - size < floor:
            break
        components = order[gone : gone + size]
        score = float(values[components].mean()) / weight
        saves = cost(count - gone) - cost(count - gone - size)
        units.append(_Unit(number, len(units), components.tolist(), score, saves))
        gone += size
    return units


def _cheapest(
    units: list[_Unit], to_save: float, blocks: Sequence[Block], currency: Budget, implant_ratio: float, multiple: int
) -> tuple[list[_Unit], dict[int, int]]:
    """The units of the lowest scores that save enough, and the ranks that come in their place.

    Where ranks come back, more units go; if even all of them do not pay for the ranks, there are none.
    """
    ranking = sorted(units, key=lambda unit: (unit.score, unit.block, unit.place))

    def fewest(ranks: dict[int, int]) -> int | None:
        """How many units must go to save enough beside some ranks."""
        gone = [0] * len(blocks)

        def saved(number: int) -> float:
            count, cost = blocks[number].num_components, currency.costs[number]
            return cost(count) - cost(count - gone[number] + ranks.get(number, 0))

        for count in range(len(ranking) + 1):
            if count:
                gone[ranking[count - 1].block] += len(ranking[count - 1].components)
            fits = all(rank <= gone[number] for number, rank in ranks.items())
            if fits and sum(map(saved, range(len(blocks)))) >= to_save:
                return count
        return None

    removed = ranking[: fewest({})]
    neurons = [unit for unit in removed if not isinstance(blocks[unit.block], AttentionBlock)]
    total = sum(len(unit.components) for unit in neurons)
    implanted: dict[int, int] = {}
    for unit in reversed(neurons):  # The most sensitive first.
        if sum(implanted.values()) + len(unit.components) > implant_ratio * total:
            break
        implanted[unit.block] = implanted.get(unit.block, 0) + len(unit.components)
    # Whole multiples, so that widths stay such.
    ranks = {number: min(n, multiple * max(1, round(IMPLANT_RANK * n / multiple))) for number, n in implanted.items()}
    count = fewest(ranks) if ranks else None
    if count is None:
        return removed, {}
    return ranking[:count], {blocks[number].index: rank for number, rank in ranks.items()}


def _promise(
    plan: PruningPlan, model: PreTrainedModel, inputs: Mapping[str, Any] | None, latency_table: LatencyTable | None
) -> dict[str, float]:
    """What the whole model will have and take."""
    promise: dict[str, float] = {}
    names = {"parameters": "params", "flops": "flops", "latency": "latency"}
    given = {"parameters": True, "flops": inputs is not None, "latency": latency_table is not None}
    for what in (name for name in names if given[name]):
        currency = make_budget(names[what], model, inputs, latency_table)
        total = currency.outside + currency.now
        for block, cost in zip(all_blocks(model), currency.costs, strict=True):
            if isinstance(block, AttentionBlock):
                left = block.num_components - len(plan.heads.get(block.index, ()))
            else:
                gone = len(plan.neurons.get(block.index, ()))
                left = block.num_components - gone + plan.implants.get(block.index, 0)
            total += cost(left) - cost(block.num_components)
        promise[what] = total if what == "latency" else round(total)
    return promise


def validate_planning(
    budget: str,
    ratio: float,
    min_heads: int | None,
    min_neurons: float | None,
    neuron_multiple: int,
    implant_ratio: float,
) -> None:
    """Checks what a plan can be asked for, without a model.

    Raises:
        ValueError: If the budget is unknown or a number is out of range.
    """
    if budget not in BUDGETS:
        raise ValueError(f"Unknown budget '{budget}'; choose one of {', '.join(BUDGETS)}.")
    if not 0 <= ratio < 1:
        raise ValueError(f"`ratio` is the share to remove and must be in [0, 1), got {ratio}.")
    if min_heads is not None and min_heads < 0:
        raise ValueError(f"`min_heads` must not be negative, got {min_heads}.")
    for name, value in (("min_neurons", min_neurons), ("implant_ratio", implant_ratio)):
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"`{name}` is a share and must be in [0, 1), got {value}.")
    if neuron_multiple < 1:
        raise ValueError(f"`neuron_multiple` must be at least 1, got {neuron_multiple}.")
