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


def shared(cells: Iterable[Cell]) -> list[Cell]:
    """The cells of those tasks and seeds that every method has at that ratio: what means over cells compare."""
    cells = [cell for cell in cells if cell["method"] != CONTROL]
    methods = {cell["method"] for cell in cells}
    having: dict[tuple[str, int, float], set[str]] = {}
    for cell in cells:
        having.setdefault((cell["task"], cell["seed"], cell["ratio"]), set()).add(cell["method"])
    return [cell for cell in cells if having[cell["task"], cell["seed"], cell["ratio"]] == methods]


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
    lines = _dense_lines(cells, tasks)
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
                    row.append(f"{_signed(mean(values))}{spread}{count}" if values else "")
                    means[ratio] += [mean(values)] if values else []
            row += [_signed(mean(values)) if len(values) == len(tasks) else "" for values in means.values()]
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _dense_lines(cells: list[Cell], tasks: list[str]) -> list[str]:
    """The dense models' own metrics, times 100, mean over seeds and their standard deviation."""
    names, texts = [], []
    for task in tasks:
        own = {cell["seed"]: cell for cell in cells if cell["task"] == task}
        metric = main_metric(next(iter(own.values())))
        values = [100 * cell["dense"][metric] for cell in own.values()]
        names.append(f"{task} {metric}")
        texts.append(f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
    lines = [["dense models, x 100", *names], ["---"] * (1 + len(tasks)), [DENSE, *texts]]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def seconds_table(cells: list[Cell]) -> str:
    """What scoring, pruning (with any refit) and recovery take in seconds, means over shared tasks and seeds."""
    methods, _, ratios = axes_of(cells)
    lines = ["| seconds: score + prune + recover | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |"]
    lines.append("| --- " * (1 + len(ratios)) + "|")
    for method in methods:
        if method == CONTROL:
            continue
        texts = []
        for ratio in ratios:
            own = [cell["seconds"] for cell in shared(cells) if (cell["method"], cell["ratio"]) == (method, ratio)]
            phases = [phase for phase in ("score", "prune", "recover") if own and phase in own[0]]
            texts.append(" + ".join(f"{mean(seconds[phase] for seconds in own):.0f}" for phase in phases))
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _signed(points: float) -> str:
    """Points with their sign, and without one for zero."""
    text = f"{points:+.1f}"
    return "0.0" if float(text) == 0 else text


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
    header = [f"{phase}: points by which {method} leads, {most} pairs", *(f"{ratio:.0%}" for ratio in ratios)]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for other in dict.fromkeys(row["other"] for row in rows):
        texts = {}
        for row in rows:
            if row["other"] == other:
                interval = f" ({_signed(row['low'])} to {_signed(row['high'])})" if "low" in row else ""
                count = f" [{row['pairs']}]" if row["pairs"] < most else ""
                texts[row["ratio"]] = f"{_signed(row['mean'])}{interval}{count}"
        lines.append(f"| over {other} | " + " | ".join(texts.get(ratio, "") for ratio in ratios) + " |")
    return "\n".join(lines)


def write_csv(cells: list[Cell], path: Path) -> None:
    """Writes a row a cell, nested names joined by dots."""
    pd.json_normalize(cells).to_csv(path, index=False)
