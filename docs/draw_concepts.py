"""Draws the pictures of `docs/concepts.md`:

python docs/draw_concepts.py
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


IMAGES = Path(__file__).parent / "images"
GREEN, RED, BLUE, GREY, DARK = "#2a7f62", "#bf616a", "#5e81ac", "#e5e9f0", "#2e3440"


def canvas(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure with empty panels whose two axes have the same scale."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    found = np.atleast_1d(figure.subplots(1, panels))
    for axes in found:
        axes.set_aspect("equal")
        axes.axis("off")
    return figure, list(found)


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str = GREY, text: str = "") -> None:
    """Draws a rectangle, given its lower left corner, with a text in its middle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1))
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        fontsize=10,
        color="white" if colour == BLUE else DARK,
    )


def note(axes: Axes, x: float, y: float, text: str, **style: object) -> None:
    """Writes a text that begins at a point."""
    axes.text(x, y, text, **{"fontsize": 11, "color": DARK, "va": "center", **style})


def draw_components(path: Path) -> None:
    """Draws the rows and columns that a head and a neuron own."""
    figure, (left, right) = canvas(9.5, 3.4, 2)
    for i, name in enumerate(("query", "key", "value")):
        for head in range(4):
            box(left, 3.2 * i, 3.2 - 0.8 * head, 2.8, 0.8, RED if head == 1 else GREY)
        note(left, 3.2 * i + 1.4, 4.4, name, ha="center")
    for head in range(4):
        box(left, 10.4 + 0.8 * head, 1.0, 0.8, 2.8, RED if head == 1 else GREY)
    note(left, 12, 4.4, "output", ha="center")
    left.set_title("a head: rows of query, key, value;\ncolumns of output", fontsize=11, color=DARK)
    for neuron in range(8):
        box(right, 0, 3.6 - 0.5 * neuron, 2.8, 0.5, RED if neuron in (2, 5) else GREY)
        box(right, 5 + 0.5 * neuron, 0.9, 0.5, 2.8, RED if neuron in (2, 5) else GREY)
    note(right, 1.4, 4.5, "input", ha="center")
    note(right, 3.9, 2.2, "GELU", ha="center")
    note(right, 7, 4.5, "output", ha="center")
    right.set_title("a neuron: a row of the input,\na column of the output", fontsize=11, color=DARK)
    for axes, width in ((left, 14), (right, 9.4)):
        axes.set_xlim(-0.3, width)
        axes.set_ylim(-0.4, 5)
    figure.savefig(path)


def draw_ladder(path: Path) -> None:
    """Draws three ever closer approximations of the same curvature."""
    random = np.random.default_rng(0)
    mixed = random.normal(size=(6, 6)) / 2 + np.diag([2.0, 1.6, 1.2, 0.8, 0.5, 0.3])
    inputs = mixed @ mixed.T
    inputs[2] = inputs[:, 2] = 0.9 * inputs[1]  # Input 2 nearly duplicates input 1.
    inputs[2, 1] = inputs[1, 2] = 0.9 * inputs[1, 1]
    inputs[2, 2] = inputs[1, 1]
    flat = np.eye(6) * np.trace(inputs) / 6
    figure, panels = canvas(9.5, 4.2, 3)
    titles = ("HAP:\none number, the trace", "Kronecker:\nwhich inputs matter", "surgeon:\nwhat others make up for")
    for axes, shown, title in zip(panels, (flat, np.diag(np.diag(inputs)), inputs), titles, strict=True):
        axes.imshow(np.abs(shown), cmap="YlGn", vmin=0, vmax=np.abs(inputs).max())
        axes.set_title(title, fontsize=11, color=DARK)
    axes = panels[2]
    axes.add_patch(Rectangle((0.5, 0.5), 2, 2, fill=False, edgecolor=RED, linewidth=2))
    axes.text(2.5, 5.8, "two inputs that say the same:\neither may go", fontsize=11, color=RED, ha="center", va="top")
    figure.savefig(path)


def draw_implant(path: Path) -> None:
    """Draws a feed-forward block whose last two neurons are linear."""
    figure, (axes,) = canvas(8, 3.2)
    for neuron in range(6):
        linear = neuron > 3
        colour = BLUE if linear else GREY
        box(axes, 0, 3.2 - 0.6 * neuron, 4, 0.6, colour, "row of A" if linear else "")
        box(axes, 5.2, 3.2 - 0.6 * neuron, 2.4, 0.6, colour, "as it is" if linear else "GELU")
        box(axes, 8.8 + 0.6 * neuron, 0.2, 0.6, 3.6, colour)
    axes.text(12.1, 2, "columns of B", fontsize=11, color="white", rotation=90, ha="center", va="center")
    for x, text in ((2, "input projection"), (6.4, "activation"), (10.6, "output projection")):
        note(axes, x, 4.2, text, ha="center")
    for x in (4.2, 7.8):
        axes.annotate("", (x + 0.8, 2), (x, 2), arrowprops={"arrowstyle": "->", "color": DARK})
    axes.set_xlim(-0.2, 12.6)
    axes.set_ylim(-0.1, 4.6)
    figure.savefig(path)


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "hap_transformers"  # The same file each time.
    draw_components(IMAGES / "components.svg")
    draw_ladder(IMAGES / "ladder.svg")
    draw_implant(IMAGES / "implant.svg")
