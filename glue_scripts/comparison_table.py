"""The cells of a comparison as tables: Markdown, CSV, and differences between methods with confidence intervals."""

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
from comparison_methods import CONTROL
from scipy.stats import bootstrap


Cell = dict[str, Any]
PHASES = ("pruned", "recovered")
FEWEST_PAIRS = 6
DENSE = "the dense model"


def main_metric(cell: Cell) -> str:
    """The first metric of a cell's task that is not the loss."""
    return next(name for name in cell["dense"] if name != "loss")


def gain(cell: Cell, phase: str) -> float:
    """Points of the task's main metric over the dense model."""
    metric = main_metric(cell)
    return 100 * (cell[phase][metric] - cell["dense"][metric])


def gains(cells: Iterable[Cell], phase: str, method: str, task: str, ratio: float) -> dict[int, float]:
    """Gains of a method by seed. What nothing was removed from counts for every ratio."""
    return {
        cell["seed"]: gain(cell, phase)
        for cell in cells
        if (cell["method"], cell["task"]) == (method, task) and (cell["ratio"] == ratio or method == CONTROL)
    }


def axes_of(cells: Iterable[Cell]) -> tuple[list[str], list[str], list[float]]:
    """Methods and tasks in the order of their cells, and ratios in rising order, without 0.

    Raises:
        ValueError: If the cells are of several budgets, of a fold and of the validation split, or, for one task and
            seed, of several dense models.
    """
    cells = list(cells)
    kinds = {(cell["budget"], cell["fold"]) for cell in cells}
    if len(kinds) > 1:
        raise ValueError(f"Cells of several budgets or folds, {sorted(kinds)}, cannot share a table; pick one kind.")
    dense: dict[tuple[str, int], dict[str, float]] = {}
    for cell in cells:
        if dense.setdefault((cell["task"], cell["seed"]), cell["dense"]) != cell["dense"]:
            raise ValueError(
                f"Cells of {cell['task']}, seed {cell['seed']}, start from several dense models and are no pairs; "
                "keep those of one run."
            )
    methods, tasks = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("method", "task"))
    return methods, tasks, sorted({cell["ratio"] for cell in cells} - {0})


def table(cells: list[Cell]) -> str:
    """Points over dense by task and ratio, mean over seeds and their standard deviation, as Markdown.

    Where there are fewer seeds than elsewhere, their number follows in brackets.
    """
    methods, tasks, ratios = axes_of(cells)
    seeds = len({cell["seed"] for cell in cells})
    lines = []
    for phase in PHASES:
        if not all(phase in cell for cell in cells):
            continue
        header = [f"{phase}: points over dense", *(f"{t} {r:.0%}" for t in tasks for r in ratios)]
        header += [f"mean {r:.0%}" for r in ratios]
        lines += ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
        for method in methods:
            row, means = [method], {ratio: [] for ratio in ratios}
            for task in tasks:
                for ratio in ratios:
                    values = list(gains(cells, phase, method, task, ratio).values())
                    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
                    count = f" [{len(values)}]" if len(values) < seeds else ""
                    row.append(f"{mean(values):+.1f}{spread}{count}" if values else "")
                    means[ratio] += [mean(values)] if values else []
            row += [f"{mean(values):+.1f}" if len(values) == len(tasks) else "" for values in means.values()]
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def differences(cells: list[Cell], method: str, phase: str = "recovered") -> list[dict[str, Any]]:
    """By how many points a method is ahead of the dense model and of every other, over all pairs of task and seed.

    Methods of one task and seed start from the same dense model, so their differences are paired. The intervals are
    95 % percentile bootstraps over the pairs. They say nothing of other validation examples, which all pairs of a
    task share, and are too narrow where pairs are few; below `FEWEST_PAIRS` there is none.

    Returns:
        `list[dict]`: With `other`, `ratio`, `pairs`, `mean`, and `low` and `high` where there are enough pairs.
    """
    methods, tasks, ratios = axes_of(cells)
    rows = []
    for other in (DENSE, *methods):
        for ratio in ratios:
            if other == method:
                continue
            pairs = []
            for task in tasks:
                own, others = (gains(cells, phase, name, task, ratio) for name in (method, other))
                others = dict.fromkeys(own, 0.0) if other == DENSE else others
                pairs += [own[seed] - others[seed] for seed in sorted(own.keys() & others.keys())]
            if not pairs:
                continue
            row = {"other": other, "ratio": ratio, "pairs": len(pairs), "mean": mean(pairs)}
            if len(pairs) >= FEWEST_PAIRS and len(set(pairs)) > 1:
                found = bootstrap((pairs,), np.mean, method="percentile", rng=np.random.default_rng(0))
                row |= {"low": float(found.confidence_interval.low), "high": float(found.confidence_interval.high)}
            rows.append(row)
    return rows


def differences_table(cells: list[Cell], method: str, phase: str = "recovered") -> str:
    """[`differences`] as Markdown, a row a rival, with the number of pairs; where it is lower, it is in brackets."""
    rows = differences(cells, method, phase)
    most = max((row["pairs"] for row in rows), default=0)
    ratios = sorted({row["ratio"] for row in rows})
    lines = [
        f"| {phase}: points of {method} over, {most} pairs | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |"
    ]
    lines.append("| --- " * (1 + len(ratios)) + "|")
    for other in dict.fromkeys(row["other"] for row in rows):
        texts = {}
        for row in rows:
            if row["other"] == other:
                interval = f" ({row['low']:+.1f} to {row['high']:+.1f})" if "low" in row else ""
                count = f" [{row['pairs']}]" if row["pairs"] < most else ""
                texts[row["ratio"]] = f"{row['mean']:+.1f}{interval}{count}"
        lines.append(f"| {other} | " + " | ".join(texts.get(ratio, "") for ratio in ratios) + " |")
    return "\n".join(lines)


def write_csv(cells: list[Cell], path: Path) -> None:
    """Writes a row a cell, nested names joined by dots."""
    pd.json_normalize(cells).to_csv(path, index=False)
