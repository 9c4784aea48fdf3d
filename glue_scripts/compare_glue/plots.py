"""Pictures of the cells of a comparison."""

from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from hap_transformers import Sensitivity

from .cells import Cell, axes_of, gain, gains, shared
from .latency import structure


# A colour for each method of the largest grid.
COLOURS = ["#2a7f62", "#bf616a", "#d08770", "#5e81ac", "#b48ead", "#a3be8c"]
COLOURS += ["#ebcb8b", "#4c566a", "#88c0d0", "#8f5e3b", "#d81b60"]

# Points below this leave the picture: with them, the lines of the other methods could not be told apart.
LOWEST = -20


def plot_gains(cells: list[Cell], path: str | Path, phases: tuple[str, ...] = ("pruned", "recovered")) -> None:
    """Draws points over dense against the share removed, a panel a task and phase, with the spread over seeds.

    Args:
        cells (`list[dict]`): The cells.
        path (`str` or `Path`): The picture's file; the ending says the format.
        phases (`tuple[str, ...]`, *optional*): The rows of panels.
    """
    _, tasks, ratios = axes_of(cells)
    figure = Figure(figsize=(1.5 + 2.9 * len(tasks), 0.6 + 2.6 * len(phases)), layout="constrained")
    panels = figure.subplots(len(phases), len(tasks), sharex=True, sharey="row", squeeze=False)
    for row, phase in zip(panels, phases, strict=True):
        for axes, task in zip(row, tasks, strict=True):
            _draw_gains(axes, cells, phase, task)
            axes.set_title(f"{task}, {phase}", fontsize=9)
            axes.set_xticks([100 * ratio for ratio in ratios], [f"{ratio:.0%}" for ratio in ratios])
        cut = bool(row[0].get_ylim()[0] < LOWEST)
        row[0].set_ylabel("points over dense" + f", cut at {LOWEST}" * cut)
        if cut:
            row[0].set_ylim(bottom=LOWEST)
    budget = {"params": "encoder parameters", "heads": "heads"}[cells[0]["budget"]]
    figure.supxlabel(f"share of {budget} removed", fontsize=9)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _draw_gains(axes: Axes, cells: list[Cell], phase: str, task: str) -> None:
    """A line a method: the means over seeds, with bars of one standard deviation."""
    methods, _, ratios = axes_of(cells)
    axes.axhline(0, color="#4c566a", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for i, method in enumerate(methods):
        points = [(ratio, list(gains(cells, phase, method, task, ratio).values())) for ratio in ratios]
        points = [(ratio, values) for ratio, values in points if values]
        positions = [100 * ratio + 0.6 * (i - len(methods) / 2) for ratio, _ in points]  # Bars side by side.
        spread = [stdev(values) if len(values) > 1 else np.nan for _, values in points]  # One seed has no bar.
        style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 2.2 if i == 0 else 1.2, "label": method}
        axes.errorbar(positions, [mean(values) for _, values in points], spread, marker="o", markersize=3, **style)


def plot_latency(cells: list[Cell], latencies: dict[str, float], path: str | Path, phase: str = "recovered") -> None:
    """Draws points over dense against the measured time of a forward pass, means over shared tasks and seeds.

    Args:
        cells (`list[dict]`): The cells.
        latencies (`dict[str, float]`): Time over the dense model's, by [`structure`].
        path (`str` or `Path`): The picture's file; the ending says the format.
        phase (`str`, *optional*, defaults to `"recovered"`): `"pruned"` or `"recovered"`.
    """
    methods, _, ratios = axes_of(cells)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="#4c566a", linewidth=0.8)
    for i, method in enumerate(methods):
        groups = [[c for c in shared(cells) if (c["method"], c["ratio"]) == (method, ratio)] for ratio in ratios]
        times = [100 * mean(latencies[structure(cell)] for cell in group) for group in groups if group]
        points = [mean(gain(cell, phase) for cell in group) for group in groups if group]
        if times:
            width = 2.2 if i == 0 else 1.2
            axes.plot(times, points, "o-", color=COLOURS[i % len(COLOURS)], linewidth=width, label=method)
    axes.set_xlabel("time of a forward pass, % of dense")
    axes.set_ylabel("points over dense")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def plot_kept(cells: list[Cell], path: str | Path) -> None:
    """Draws how many heads and neurons each layer keeps, by method and ratio, the mean over shared tasks and seeds.

    Args:
        cells (`list[dict]`): The cells.
        path (`str` or `Path`): The picture's file; the ending says the format.
    """
    methods, _, ratios = axes_of(cells)
    methods = [name for name in methods if any(cell["method"] == name and cell["ratio"] in ratios for cell in cells)]
    figure = Figure(figsize=(2.5 + 2.6 * len(ratios), 1.0 + 0.7 * len(methods)), layout="constrained")
    panels = figure.subplots(2, len(ratios), squeeze=False, sharex=True, sharey=True)
    for row, kind in zip(panels, ("heads", "neurons"), strict=True):
        most, width = max(max(cell[kind]) for cell in cells), len(cells[0][kind])
        for axes, ratio in zip(row, ratios, strict=True):
            at_ratio = [cell for cell in shared(cells) if cell["ratio"] == ratio]
            counts = [[cell[kind] for cell in at_ratio if cell["method"] == name] for name in methods]
            means = np.array([np.mean(layers, axis=0) if layers else np.full(width, np.nan) for layers in counts])
            axes.imshow(means, cmap="YlGn", aspect="auto", vmin=0, vmax=most)
            for (i, j), value in np.ndenumerate(means):
                if not np.isnan(value):
                    colour = "white" if value > 0.6 * most else "black"
                    axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
            axes.set_title(f"{kind} kept, {ratio:.0%} removed", fontsize=9)
            axes.set_xticks(range(width))
            axes.set_yticks(range(len(methods)), methods, fontsize=7)
    figure.supxlabel("layer", fontsize=9)
    figure.savefig(path, dpi=150)


def plot_rank_correlations(scores: dict[str, list[Sensitivity]], path: str | Path) -> None:
    """Draws Spearman's correlation between methods' rankings of heads and of neurons.

    Args:
        scores (`dict[str, list[Sensitivity]]`): By method, scores of the same models in the same order. The mean over
            models is drawn.
        path (`str` or `Path`): The picture's file; the ending says the format.
    """
    names = list(scores)
    figure = Figure(figsize=(3 + 1.1 * len(names), 1.2 + 0.5 * len(names)), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("heads", "neurons"), strict=True):
        flat = [[np.concatenate(one.scores[kind]) for one in of_models] for of_models in scores.values()]
        values = np.array(
            [[np.mean([spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]) for y in flat] for x in flat]
        )
        axes.imshow(values, cmap="RdYlGn", vmin=-1, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.8 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_title(f"rank correlation, {kind}", fontsize=9)
    figure.savefig(path, dpi=150)
