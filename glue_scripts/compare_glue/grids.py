"""The grids of cells that a comparison can have."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from .base_models import BASE_MODELS, MINILM, MPNET
from .cells import Cell, Key, read_cells
from .methods import CONTROL, DEFAULT, METHODS, PAPER, TUNED
from .settings import SETTINGS


@dataclass
class Grid:
    """Every combination of tasks, methods, ratios and seeds.

    Args:
        tasks (`list[str]`): Names in `SETTINGS`.
        methods (`list[str]`): Names in `METHODS`.
        ratios (`list[float]`): Shares of the budget to remove.
        seeds (`list[int]`): Seeds. For each seed, every method starts from the same dense model.
        budget (`str`, *optional*, defaults to `"params"`): `"params"` of the encoder, or `"heads"`.
        model (`str`, *optional*): A name in `BASE_MODELS`.

    Raises:
        ValueError: If a model, task, method or budget is unknown, or a ratio is not a share.
    """

    tasks: list[str]
    methods: list[str]
    ratios: list[float]
    seeds: list[int]
    budget: str = "params"
    model: str = MINILM

    def __post_init__(self):
        if self.model not in BASE_MODELS:
            raise ValueError(f"Unknown model '{self.model}'; choose one of {', '.join(BASE_MODELS)}.")
        unknown = [name for name in self.methods if name not in METHODS]
        unknown += [name for name in self.tasks if name not in SETTINGS]
        if unknown:
            raise ValueError(f"Unknown {unknown}; methods are {', '.join(METHODS)}, tasks {', '.join(SETTINGS)}.")
        if self.budget not in ("params", "heads"):
            raise ValueError(f"Methods are compared by 'params' or 'heads', not by budget '{self.budget}'.")
        if not all(0 < ratio < 1 for ratio in self.ratios):
            raise ValueError(f"Ratios are shares between 0 and 1, got {self.ratios}.")

    def keys(self, fold: bool = False) -> list[Key]:
        """Returns the keys of all cells, seed by seed, so that a run that is cut short has whole seeds."""
        return [
            Key(self.model, task, method, self.budget, ratio, seed, fold)
            for seed, task, method in product(self.seeds, self.tasks, self.methods)
            for ratio in ([0.0] if method == CONTROL else self.ratios)
        ]

    def cells_in(self, file: Path, fold: bool = False) -> list[Cell]:
        """Returns the grid's cells that a file has, in the grid's order."""
        cells = read_cells(file)
        return [cells[key] for key in self.keys(fold) if key in cells]


# From a light to a heavy pruning, and the fewest seeds that give a standard deviation worth showing.
ALL_RATIOS, ALL_SEEDS = [0.4, 0.6, 0.8], [0, 1, 2]
ALL_TASKS = list(SETTINGS)
RIVALS = [DEFAULT, "gradient", "gradient, floor and refit", "top layers, floor and refit"]
# The default with parts taken away or added, other scores with its planning and refit, and other recipes.
PARTS = [
    *(DEFAULT, "kronecker, no refit", "kronecker + refit, no distillation", "kronecker + refit, implants"),
    *(PAPER, "relative trace, floor and refit", "fisher, floor and refit", "magnitude, floor and refit"),
    *("gradient, neurons normalized", "top layers dropped", "Torch-Pruning, Taylor"),
]

PRESETS = {
    "quick": {"quick": Grid(["sst2", "cola"], [DEFAULT, "gradient"], [0.6, 0.8], [0])},
    "full": {
        "main": Grid(ALL_TASKS, [*RIVALS, "random", CONTROL], ALL_RATIOS, ALL_SEEDS),
        "heads": Grid(ALL_TASKS, [DEFAULT, "gradient", "random"], ALL_RATIOS, ALL_SEEDS, "heads"),
        "parts": Grid(["mrpc", "sst2"], PARTS, [0.6, 0.8], [0, 1]),
    },
    # The rival's floors of a head and a twentieth of the neurons a layer leave more than 5 %.
    "compression": {
        "compression": Grid(ALL_TASKS, [TUNED, DEFAULT, CONTROL], [0.6, 0.8, 0.9, 0.95], ALL_SEEDS),
        "rivals": Grid(ALL_TASKS, ["gradient, floor and refit"], [0.9], ALL_SEEDS),
    },
    "base": {
        "base": Grid(ALL_TASKS, [TUNED, *RIVALS, CONTROL], [0.6, 0.8, 0.9], ALL_SEEDS, model=MPNET),
    },
}
