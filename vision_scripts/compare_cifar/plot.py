"""Draws the accuracy of the pruned networks against their parameters."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from glue_scripts.compare_glue.cells import Cell
from glue_scripts.compare_glue.plots import COLOURS

from .methods import METHODS, NOTHING
from .networks import NETWORKS
from .tables import PHASES


def plot_accuracy(cells: Sequence[Cell], path: Path) -> None:
    """Draws a panel a network, a line a method, and a point a ratio: the mean over seeds after the last phase.

    Args:
        cells (`Sequence[dict]`): The cells, of one recovery budget and one number of images to refit on.
        path (`Path`): The picture's file; the ending says the format.
    """
    networks = [network for network in NETWORKS if any(cell["network"] == network for cell in cells)]
    methods = [name for name in METHODS if name != NOTHING and any(cell["method"] == name for cell in cells)]
    figure = Figure(figsize=(2.6 + 3.2 * len(networks), 3.4), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    for axes, network in zip(panels, networks, strict=True):
        for number, method in enumerate(methods):
            of_method = [cell for cell in cells if (cell["network"], cell["method"]) == (network, method)]
            ratios = sorted({cell["ratio"] for cell in of_method})
            groups = [[cell for cell in of_method if cell["ratio"] == ratio] for ratio in ratios]
            sizes = [100 * mean(cell["parameters"] / cell["dense_parameters"] for cell in group) for group in groups]
            heights = [100 * mean(_last(cell) for cell in group) for group in groups]
            style = {"color": COLOURS[number], "linewidth": 2.2 if number == 0 else 1.2, "label": method}
            axes.plot(sizes, heights, "o-", markersize=3, **style)
        dense = mean(cell["dense"]["accuracy"] for cell in cells if cell["network"] == network)
        axes.axhline(100 * dense, color="#4c566a", linewidth=0.8, linestyle=":")
        axes.set_title(network, fontsize=9)
        axes.set_xlabel("parameters left, %", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, %")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(
        [lines[method] for method in methods], methods, loc="outside right center", fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=150)


def _last(cell: Cell) -> float:
    """The accuracy after the last phase that a cell has."""
    return [cell[phase]["accuracy"] for phase in PHASES if phase in cell][-1]
