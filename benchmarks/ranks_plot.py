"""Draws the divergence from the dense model against the time, for each way to prune attention."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure


COLOURS = {
    "dimensions": "#2f6f4f",
    "dimensions, tuned": "#7fb77e",
    "heads": "#b8622d",
    "uneven dimensions": "#5a6f9f",
}


def plot_ranks(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws a panel a task, a line a way, and a point a ratio.

    Args:
        cells (`Sequence[dict]`): The cells of `benchmarks.ranks`. Points are means over samples.
        path (`Path`): The picture's file; the ending says the format.
    """
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    figure = Figure(figsize=(1 + 3.2 * len(tasks), 3.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for way, colour in COLOURS.items():
            of_way = [cell for cell in cells if (cell["task"], cell["way"]) == (task, way)]
            ratios = sorted({cell["ratio"] for cell in of_way})
            points = [[cell for cell in of_way if cell["ratio"] == ratio] for ratio in ratios]
            times = [100 * mean(cell["time"] for cell in group) for group in points]
            axes.plot(times, [mean(cell["kl"] for cell in group) for group in points], "o-", color=colour, label=way)
        axes.set_title(task)
        axes.set_xlabel("time of a forward pass, % of dense")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("KL to the dense model")
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
