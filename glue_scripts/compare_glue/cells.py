"""The cells of a comparison: how they are read, and what they say about methods."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from .methods import CONTROL


Cell = dict[str, Any]
PHASES = ("pruned", "recovered")


class Key(NamedTuple):
    """The fields that tell one cell from another."""

    model: str
    task: str
    method: str
    budget: str
    ratio: float
    seed: int
    fold: bool

    @property
    def job(self) -> tuple[str, str, int]:
        """Base model, task and seed: all cells of a job start from one dense model."""
        return self.model, self.task, self.seed


def read_cells(file: Path, key: type[NamedTuple] = Key) -> dict[Any, Cell]:
    """Reads the cells of a file, a JSON line each; an absent file has none.

    Args:
        file (`Path`): The file.
        key (`type[NamedTuple]`, *optional*): The fields that tell one cell from another; by default the study's.

    Raises:
        ValueError: If a line is no cell, for example one that a full disk has cut.
    """
    cells = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else [], 1):
        try:
            cell = json.loads(line)
            cells[key(*(cell[name] for name in key._fields))] = cell
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"Line {number} of '{file}' is no cell; remove it, and it is run again.") from error
    return cells


def write_csv(cells: list[Cell], path: Path) -> None:
    """Writes a row a cell, nested names joined by dots."""
    pd.json_normalize(cells).to_csv(path, index=False)


def main_metric(cell: Cell) -> str:
    """Returns the first metric of a cell's task that is not the loss."""
    return next(name for name in cell["dense"] if name != "loss")


def gain(cell: Cell, phase: str) -> float:
    """Returns the points by which a phase exceeds the dense model in the task's main metric."""
    metric = main_metric(cell)
    return 100 * (cell[phase][metric] - cell["dense"][metric])


def gains(cells: Iterable[Cell], phase: str, method: str, task: str, ratio: float) -> dict[int, float]:
    """Returns the gains of a method by seed, of cells with that phase.

    Those of the control, which removes nothing, count for every ratio.
    """
    return {
        cell["seed"]: gain(cell, phase)
        for cell in cells
        if (cell["method"], cell["task"]) == (method, task)
        and (cell["ratio"] == ratio or method == CONTROL)
        and phase in cell
    }


def shared(cells: Iterable[Cell]) -> list[Cell]:
    """Selects the tasks, seeds and ratios that every method has, so that means over cells can be compared."""
    cells = [cell for cell in cells if cell["method"] != CONTROL]
    methods = {cell["method"] for cell in cells}
    methods_of: dict[tuple[str, int, float], set[str]] = {}
    for cell in cells:
        methods_of.setdefault((cell["task"], cell["seed"], cell["ratio"]), set()).add(cell["method"])
    return [cell for cell in cells if methods_of[cell["task"], cell["seed"], cell["ratio"]] == methods]


def axes_of(cells: Iterable[Cell]) -> tuple[list[str], list[str], list[float]]:
    """Returns methods and tasks in the order of their cells, and ratios in rising order, 0 only if there is no other.

    Raises:
        ValueError: If cells have several base models or budgets, if only some are of a fold, or if cells of one task
            and seed start from several dense models.
    """
    cells = list(cells)
    kinds = {(cell["model"], cell["budget"], cell["fold"]) for cell in cells}
    if len(kinds) > 1:
        raise ValueError(
            f"Cells of several models, budgets or folds, {sorted(kinds)}, cannot share a table; pick one kind."
        )
    dense: dict[tuple[str, int], dict[str, float]] = {}
    for cell in cells:
        if dense.setdefault((cell["task"], cell["seed"]), cell["dense"]) != cell["dense"]:
            raise ValueError(
                f"Cells of {cell['task']}, seed {cell['seed']}, start from several dense models and are no pairs; "
                "keep those of one run."
            )
    methods, tasks = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("method", "task"))
    ratios = {cell["ratio"] for cell in cells}
    return methods, tasks, sorted(ratios - {0} or ratios)
