"""The cells of the comparison of sentence encoders, a line of JSON each, and the grids of cells to compute."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from glue_scripts.compare_glue.cells import Cell

from .embeddings_data import CALIBRATION
from .embeddings_methods import DEFAULT, METHODS, WHOLE_HEADS


RATIOS = (0.2, 0.4, 0.6, 0.8, 0.9)
HEAVY = (0.6, 0.8)
# Sentences to score on, and to refit on.
EXAMPLES, REFIT_EXAMPLES = 1024, 4096
REFIT_SIZES = (512, 1024, 2048, 4096, 8192)
HOME, ELSEWHERE = CALIBRATION
DENSE = "dense"
# What recovery is tried with, and what it is measured with: learning rate, weight of the hidden states.
RECOVERIES = tuple(product((2e-5, 5e-5, 1e-4, 3e-4), (0.0, 1.0)))
RECOVERY = (3e-4, 0.0)


class Key(NamedTuple):
    """The fields that tell one cell from another. A phase without recovery has no learning rate (0)."""

    model: str
    method: str
    text: str
    ratio: float
    seed: int
    refit_examples: int = REFIT_EXAMPLES
    phase: str = "pruned"
    learning_rate: float = 0.0
    hidden: float = 0.0


def append_cell(file: Path, cell: Cell) -> None:
    """Adds a line."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(cell) + "\n")


def dense_key(model: str) -> Key:
    """The cell of the dense model."""
    return Key(model, DENSE, "", 0.0, 0, refit_examples=0)


def keys_of(grid: str, model: str, seeds: Sequence[int]) -> list[Key]:
    """The keys of a grid's cells, seed by seed, so that a run that is cut short has whole seeds.

    Args:
        grid (`str`): `"default"` for the default method alone, `"main"` for all methods, `"elsewhere"` for all of them
            on text of another domain, `"sizes"` for refits on more and fewer sentences, `"rates"` for the settings of
            recovery, or `"recovered"`.
        model (`str`): The model.
        seeds (`Sequence[int]`): Seeds of the calibration sample.

    Raises:
        ValueError: If there is no such grid.
    """
    grids = {
        "default": lambda seed: [Key(model, DEFAULT, text, r, seed) for text in CALIBRATION for r in RATIOS],
        "main": lambda seed: [Key(model, method, HOME, r, seed) for method in METHODS for r in RATIOS],
        "elsewhere": lambda seed: [Key(model, method, ELSEWHERE, r, seed) for method in METHODS for r in HEAVY],
        "sizes": lambda seed: [
            Key(model, WHOLE_HEADS, text, r, seed, size) for text in CALIBRATION for size in REFIT_SIZES for r in HEAVY
        ],
        "rates": lambda seed: [
            Key(model, DEFAULT, HOME, r, seed, phase="recovered", learning_rate=rate, hidden=hidden)
            for rate, hidden in RECOVERIES
            for r in HEAVY
        ],
        "recovered": lambda seed: [
            Key(model, DEFAULT, text, r, seed, phase="recovered", learning_rate=RECOVERY[0], hidden=RECOVERY[1])
            for text in CALIBRATION
            for r in HEAVY
        ],
    }
    if grid not in grids:
        raise ValueError(f"There is no grid '{grid}'; choose from {', '.join(grids)}.")
    return [key for seed in seeds for key in grids[grid](seed)]
