"""Which cells a comparison has."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from comparison_job import SETTINGS
from comparison_methods import CONTROL, METHODS


Key = tuple[str, str, str, float, int, bool]
KEY_NAMES = ("task", "method", "budget", "ratio", "seed", "fold")


@dataclass
class Grid:
    """Every combination of tasks, methods, ratios and seeds.

    Args:
        tasks (`list[str]`): Of `SETTINGS`.
        methods (`list[str]`): Of `METHODS`.
        ratios (`list[float]`): Shares of the budget to remove.
        seeds (`list[int]`): Seeds; every method starts from the same dense model of a seed.
        budget (`str`, *optional*, defaults to `"params"`): `"params"` of the encoder, or `"heads"`.

    Raises:
        ValueError: If a task, method or budget is unknown, or a ratio is not a share.
    """

    tasks: list[str]
    methods: list[str]
    ratios: list[float]
    seeds: list[int]
    budget: str = "params"

    def __post_init__(self):
        unknown = [name for name in self.methods if name not in METHODS]
        unknown += [name for name in self.tasks if name not in SETTINGS]
        if unknown:
            raise ValueError(f"Unknown {unknown}; methods are {', '.join(METHODS)}, tasks {', '.join(SETTINGS)}.")
        if self.budget not in ("params", "heads"):
            raise ValueError(f"Methods are compared by 'params' or 'heads', not by budget '{self.budget}'.")
        if not all(0 < ratio < 1 for ratio in self.ratios):
            raise ValueError(f"Ratios are shares between 0 and 1, got {self.ratios}.")

    def keys(self, fold: bool = False) -> list[Key]:
        """What tells the cells apart, seed by seed, so that a run that is cut short has whole seeds."""
        return [
            (task, method, self.budget, ratio, seed, fold)
            for seed, task, method in product(self.seeds, self.tasks, self.methods)
            for ratio in ([0.0] if method == CONTROL else self.ratios)
        ]

    def cells_in(self, file: Path, fold: bool = False) -> list[dict[str, Any]]:
        """The cells that a file has, in the grid's order."""
        cells = read_cells(file)
        return [cells[key] for key in self.keys(fold) if key in cells]


def job_of(key: Key) -> tuple[str, int]:
    """Task and seed of a cell: what has one dense model."""
    return key[0], key[4]


def read_cells(file: Path) -> dict[Key, dict[str, Any]]:
    """The cells of a file, a JSON line each.

    Raises:
        ValueError: If a line is no cell, such as one that a full disk has cut.
    """
    cells = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else [], 1):
        try:
            cell = json.loads(line)
            cells[tuple(cell[name] for name in KEY_NAMES)] = cell
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"Line {number} of '{file}' is no cell; remove it, and it is run again.") from error
    return cells


ALL_RATIOS, ALL_SEEDS = [0.4, 0.6, 0.8], [0, 1, 2]
RIVALS = ["hap", "gradient", "gradient, floor and refit", "top layers, floor and refit"]
PARTS = [
    *("hap", "hap without refit", "hap without distillation", "hap with implants"),
    *("paper", "relative trace, floor and refit", "fisher, floor and refit", "magnitude, floor and refit"),
    *("gradient, neurons normalized", "top layers dropped", "Torch-Pruning, Taylor"),
]

PRESETS = {
    "quick": {"quick": Grid(["sst2", "cola"], ["hap", "gradient"], [0.6, 0.8], [0])},
    "full": {
        "main": Grid(["mrpc", "sst2", "cola", "stsb"], [*RIVALS, "random", CONTROL], ALL_RATIOS, ALL_SEEDS),
        "heads": Grid(["mrpc", "sst2", "cola", "stsb"], ["hap", "gradient", "random"], ALL_RATIOS, ALL_SEEDS, "heads"),
        "parts": Grid(["mrpc", "sst2"], PARTS, [0.6, 0.8], [0, 1]),
    },
}
