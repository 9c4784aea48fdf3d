"""Removes components so that all parts of a layer that are left, such as its heads, have equally many.

What is around the parts works with as many components as the widest part has. A layer of equal parts is an ordinary
layer of fewer and narrower ones, and as fast.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..components.groups import KINDS, Group
from .budgets import JointCost
from .choosing import Unit, ranked_in_runs
from .gone_parts import Scored
from .settings import finest_step


def evened_layers(groups: Sequence[Group], scored: Scored) -> list[list[int]]:
    """The places of groups that can get equal parts, layer by layer.

    Args:
        groups (`Sequence[Group]`): All groups.
        scored (`Mapping[int, tuple[torch.Tensor, torch.Tensor]]`): Scores, and the order of removal, by place of the
            groups that can lose components. Parts get narrower only if these are all kinds that they consist of.
    """
    by_layer: dict[int, list[int]] = {}
    for place in scored:
        runs = groups[place].runs
        if runs is not None and runs.narrows:
            by_layer.setdefault(groups[place].layer, []).append(place)
    return [places for places in by_layer.values() if len(places) == _kinds(groups[places[0]])]


def _kinds(group: Group) -> int:
    return 0 if group.runs is None else len(group.runs.of_kinds)


def even_units(
    places: Sequence[int], groups: Sequence[Group], scored: Scored, floor: int, cost: JointCost, step: int
) -> list[Unit]:
    """What can go from the parts of a layer, first unit first: one part, or some components of every part.

    Of these, the one goes next that harms least for what it saves. A part loses its components in the order in which
    the layer loses them. Once a part is gone, the loss of its components that need others harms no more.

    Args:
        places (`Sequence[int]`): Places of the layer's groups.
        groups (`Sequence[Group]`): All groups.
        scored (`Mapping[int, tuple[torch.Tensor, torch.Tensor]]`): Scores, and the order of removal, by place.
        floor (`int`): Components of the needed kind that the layer keeps at least.
        cost (`JointCost`): What the layer's parts cost.
        step (`int`): Parts keep a multiple of this many components, or of a quarter of a dense part if that is less.
    """
    layer = _Layer.of(places, groups, scored, cost)
    step = finest_step(step, layer.dense_width)
    units: list[Unit] = []
    while moves := [move for move in (layer.narrower(step), *layer.without_one()) if layer.keeps(move, floor)]:
        move = min(moves, key=lambda move: move.harm / max(move.saves, sys.float_info.min))
        layer.make(move)
        components = {place: [p for run in runs for p in run] for place, runs in move.gone.items()}
        components = {place: positions for place, positions in components.items() if positions}
        units.append(Unit(components, len(units), 0.0, move.harm, move.saves))  # Scored as runs.
    return ranked_in_runs(units)


@dataclass
class _Move:
    """Components that go: by place, for every part."""

    gone: dict[int, list[list[int]]]
    harm: float
    saves: float


@dataclass
class _Layer:
    """The components that the parts of a layer have left, those that go first before others."""

    left: dict[int, list[list[int]]]  # By place, for every part.
    scores: dict[int, list[float]]
    kinds: dict[int, str]
    cost: JointCost
    needed: int  # Place of the group without whose components a part is gone.
    charged: list[float]  # For every part, the harm so far of components that are of no use once it is gone.
    dense_width: int

    @classmethod
    def of(cls, places: Sequence[int], groups: Sequence[Group], scored: Scored, cost: JointCost) -> "_Layer":
        left: dict[int, list[list[int]]] = {}
        scores: dict[int, list[float]] = {}
        for place in places:
            values, order = scored[place]
            runs = groups[place].runs
            assert runs is not None
            owners, left[place] = runs.of_each(), [[] for _ in runs.left]
            for position in order.tolist():
                left[place][owners[position]].append(position)
            scores[place] = values.tolist()
        needs = {KINDS[groups[place].kind.name].needs for place in places}
        (needed,) = (place for place in places if groups[place].kind.name in needs)
        whole = groups[needed].runs.whole
        kinds = {place: groups[place].kind.name for place in places}
        return cls(left, scores, kinds, cost, needed, [0.0] * len(left[needed]), whole.head_size)

    def narrower(self, step: int) -> _Move:
        """All parts lose what they have beyond the next multiple."""
        width = max((len(run) for runs in self.left.values() for run in runs), default=0)
        width = (width - 1) // step * step
        if width < step:
            return _Move({}, 0.0, 0.0)
        gone = {place: [run[: max(len(run) - width, 0)] for run in runs] for place, runs in self.left.items()}
        return self._move(gone, sum(self._harm(place, run) for place, runs in gone.items() for run in runs))

    def without_one(self) -> list[_Move]:
        """For every part that is left: it goes."""
        moves = []
        for part, run in enumerate(self.left[self.needed]):
            gone = {place: [r if p == part else [] for p, r in enumerate(runs)] for place, runs in self.left.items()}
            moves.append(self._move(gone, max(self._harm(self.needed, run) - self.charged[part], 0.0)))
        return moves

    def keeps(self, move: _Move, floor: int) -> bool:
        """Whether a move takes anything, and leaves enough."""
        gone = sum(map(len, move.gone.get(self.needed, [])))
        return gone > 0 and sum(map(len, self.left[self.needed])) - gone >= floor

    def make(self, move: _Move) -> None:
        """Takes the components away."""
        for place, runs in move.gone.items():
            for part, run in enumerate(runs):
                if place != self.needed:
                    self.charged[part] += self._harm(place, run)
                self.left[place][part] = self.left[place][part][len(run) :]

    def _move(self, gone: dict[int, list[list[int]]], harm: float) -> _Move:
        now = {self.kinds[place]: [len(run) for run in runs] for place, runs in self.left.items()}
        then = {
            self.kinds[place]: [len(run) - len(lost) for run, lost in zip(runs, gone[place], strict=True)]
            for place, runs in self.left.items()
        }
        return _Move(gone, harm, self.cost(now) - self.cost(then))

    def _harm(self, place: int, run: Sequence[int]) -> float:
        return sum(self.scores[place][position] for position in run)
