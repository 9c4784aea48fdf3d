"""Tables of a comparison: points over dense, paired differences with confidence intervals, and seconds."""

from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from .cells import PHASES, Cell, axes_of, gain, gains, main_metric, shared
from .methods import CONTROL


# A bootstrap of fewer pairs hardly covers what it should.
FEWEST_PAIRS = 6
DENSE = "the dense model"


def table(cells: list[Cell]) -> str:
    """Formats points over dense by task and ratio, mean over seeds and their standard deviation, as Markdown.

    A cell of the table that has fewer seeds than others has their number in brackets. Cells without recovery have no
    part in the table of recovered models.
    """
    _, tasks, _ = axes_of(cells)
    tables = [_dense_table(cells, tasks)]
    tables += [_phase_table(cells, phase) for phase in PHASES if any(phase in cell for cell in cells)]
    return "\n\n".join(tables)


def _phase_table(cells: list[Cell], phase: str) -> str:
    """Points over dense of a phase, a row a method."""
    methods, tasks, ratios = axes_of(cells)
    seeds = len({cell["seed"] for cell in cells})
    header = [f"{phase}: points over dense", *(f"{task} {ratio:.0%}" for task in tasks for ratio in ratios)]
    rows = []
    for method in methods:
        row, means = [method], {ratio: [] for ratio in ratios}
        for task in tasks:
            for ratio in ratios:
                values = list(gains(cells, phase, method, task, ratio).values())
                spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
                count = f" [{len(values)}]" if len(values) < seeds else ""
                row.append(f"{_signed(mean(values))}{spread}{count}" if values else "")
                means[ratio] += [mean(values)] if values else []
        if len(tasks) > 1:
            row += [_signed(mean(values)) if len(values) == len(tasks) else "" for values in means.values()]
        rows.append(row)
    return _markdown([*header, *(f"mean {ratio:.0%}" for ratio in ratios if len(tasks) > 1)], rows)


def _dense_table(cells: list[Cell], tasks: list[str]) -> str:
    """Metrics of the dense models, times 100, mean over seeds and their standard deviation."""
    names, texts = [], []
    for task in tasks:
        by_seed = {cell["seed"]: cell for cell in cells if cell["task"] == task}
        metric = main_metric(next(iter(by_seed.values())))
        values = [100 * cell["dense"][metric] for cell in by_seed.values()]
        names.append(f"{task} {metric}")
        texts.append(f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
    return _markdown(["dense models, x 100", *names], [[DENSE, *texts]])


def seconds_table(cells: list[Cell]) -> str:
    """Formats the seconds of scoring, pruning (with any refit) and recovery, means over shared tasks and seeds."""
    methods, _, ratios = axes_of(cells)
    rows = []
    for method in methods:
        if method == CONTROL:
            continue
        row = [method]
        for ratio in ratios:
            same = [cell for cell in shared(cells) if (cell["method"], cell["ratio"]) == (method, ratio)]
            found = pd.DataFrame([cell["seconds"] for cell in same]).mean()  # Not all cells may have all phases.
            row.append(" + ".join(f"{found[phase]:.0f}" for phase in ("score", "prune", "recover") if phase in found))
        rows.append(row)
    return _markdown(["seconds: score + prune + recover", *(f"{ratio:.0%}" for ratio in ratios)], rows)


def differences(cells: list[Cell], method: str, phase: str = "recovered") -> list[dict[str, Any]]:
    """Computes the points by which a method leads the dense model and every other method, over all pairs.

    A pair is a task and seed. Its methods start from the same dense model, so their differences are paired. The
    intervals are 95 % percentile bootstraps over the pairs. They do not cover other validation examples, which all
    pairs of a task share. Few pairs make them too narrow; fewer than `FEWEST_PAIRS` have none.

    Returns:
        `list[dict]`: With `other`, `ratio`, `pairs`, `mean`, and `low` and `high` where there are enough pairs.
    """
    methods, tasks, ratios = axes_of(cells)
    # Before the recovery the control is the dense model.
    without = {method, CONTROL} if phase == "pruned" else {method}
    rows = []
    for other in (DENSE, *(name for name in methods if name not in without)):
        for ratio in ratios:
            pairs = []
            for task in tasks:
                leads, others = (gains(cells, phase, name, task, ratio) for name in (method, other))
                others = dict.fromkeys(leads, 0.0) if other == DENSE else others
                pairs += [leads[seed] - others[seed] for seed in sorted(leads.keys() & others.keys())]
            if not pairs:
                continue
            row = {"other": other, "ratio": ratio, "pairs": len(pairs), "mean": mean(pairs)}
            if len(pairs) >= FEWEST_PAIRS and len(set(pairs)) > 1:
                found = bootstrap((pairs,), np.mean, method="percentile", rng=np.random.default_rng(0))
                row |= {"low": float(found.confidence_interval.low), "high": float(found.confidence_interval.high)}
            rows.append(row)
    return rows


def differences_table(cells: list[Cell], method: str, phase: str = "recovered") -> str:
    """Formats [`differences`] as Markdown, a row a rival; where a number has fewer pairs, brackets hold how many."""
    found = differences(cells, method, phase)
    most = max((row["pairs"] for row in found), default=0)
    ratios = sorted({row["ratio"] for row in found})
    header = [f"{phase}: points by which {method} leads, {most} pairs", *(f"{ratio:.0%}" for ratio in ratios)]
    rows = []
    for other in dict.fromkeys(row["other"] for row in found):
        texts = {}
        for row in found:
            if row["other"] == other:
                interval = f" ({_signed(row['low'])} to {_signed(row['high'])})" if "low" in row else ""
                count = f" [{row['pairs']}]" if row["pairs"] < most else ""
                texts[row["ratio"]] = f"{_signed(row['mean'])}{interval}{count}"
        rows.append([f"over {other}", *(texts.get(ratio, "") for ratio in ratios)])
    return _markdown(header, rows)


def recovery_table(cells_of: dict[str, list[Cell]], method: str) -> str:
    """Formats a method's points over dense before and after the recovery as Markdown, a row a set of cells.

    Args:
        cells_of (`dict[str, list[Cell]]`): Cells by the row's name. Rows may differ in base model and recovery. Cells
            without recovery are left out.
        method (`str`): The method.

    Returns:
        `str`: Means over all pairs of task and seed, whose number brackets hold.
    """
    ratios = sorted({cell["ratio"] for cells in cells_of.values() for cell in cells if cell["method"] == method})
    rows = []
    for name, cells in cells_of.items():
        row = [name]
        for ratio in ratios:
            same = [cell for cell in cells if (cell["method"], cell["ratio"]) == (method, ratio) and PHASES[1] in cell]
            before, after = ([gain(cell, phase) for cell in same] for phase in PHASES)
            row.append(f"{_signed(mean(before))} to {_signed(mean(after))} [{len(same)}]" if same else "")
        rows.append(row)
    return _markdown(["points over dense before and after recovery", *(f"{ratio:.0%}" for ratio in ratios)], rows)


def _signed(points: float) -> str:
    """Points with their sign; zero has none."""
    text = f"{points:+.1f}"
    return "0.0" if float(text) == 0 else text


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
