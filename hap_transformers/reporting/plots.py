"""Pictures of scores and structures."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ..components.groups import by_kind, find_groups
from ..files import whole_file
from ..sensitivity import Sensitivity
from ..surgery.plan import PruningPlan


def plot_head_sensitivity(
    sensitivity: Sensitivity, path: str | Path, plan: PruningPlan | None = None, title: str | None = None
) -> None:
    """Draws the head scores of a dense model as a heat map, layers by heads, and saves it.

    Heads that `plan` removes are crossed out. Scores that are zero or negative, as Hutchinson's estimates can be, have
    the palest colour.

    Args:
        sensitivity (`Sensitivity`): The scores; every layer must have all its heads.
        path (`str` or `Path`): Where to write the picture. The suffix sets the format.
        plan (`PruningPlan`, *optional*): The heads to cross out.
        title (`str`, *optional*): The picture's title.

    Raises:
        ValueError: If heads were not scored, or layers have different numbers of them.
    """
    if sensitivity.heads is None:
        raise ValueError("The sensitivity has no scores of heads to draw.")
    if len({len(scores) for scores in sensitivity.heads}) != 1:
        raise ValueError("Layers have different numbers of heads; plot the sensitivity of a model not yet pruned.")
    scores = torch.stack(sensitivity.heads).float().numpy()
    layers, heads = scores.shape
    figure = Figure(figsize=(1.6 + 0.55 * heads, 1.6 + 0.45 * layers), layout="constrained")
    axes = figure.subplots()
    positive = scores[scores > 0]
    floor = positive.min() if positive.size else 1.0
    norm = LogNorm(floor, max(positive.max(initial=floor), floor * 1.01))
    image = axes.imshow(np.maximum(scores, floor), norm=norm, cmap="YlGnBu", aspect="auto")
    figure.colorbar(image, ax=axes, label="score (log scale)")
    if plan is not None:
        crosses = [(head, layer) for layer, removed in plan.heads.items() for head in removed]
        if crosses:
            columns, rows = zip(*crosses, strict=True)
            axes.scatter(columns, rows, marker="x", color="crimson", s=60, label="removed")
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)
    _label(axes, layers, heads)
    note = "" if sensitivity.reliability is None else f", reliability {sensitivity.reliability:.2f}"
    axes.set_title(title or f"Head sensitivity ({sensitivity.method}, {sensitivity.num_examples} examples{note})")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def plot_structure(model: PreTrainedModel, path: str | Path) -> None:
    """Draws how many components of each kind the layers of a model have left, and saves it.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture, pruned or not.
        path (`str` or `Path`): Where to write the picture. The suffix sets the format.
    """
    groups = find_groups(model)
    found, layers = by_kind(groups), sorted({group.layer for group in groups})
    figure = Figure(figsize=(2.5 + 0.5 * len(layers), 2.1 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (kind, members) in zip(rows, found.items(), strict=True):
        places = [group.layer for group in members]
        if kind.keeps_numbers:  # The other kinds do not know how many there were.
            axes.bar(places, [group.original for group in members], color="#e5e9f0", label="removed")
        bars = axes.bar(places, [group.num_components for group in members], color="#2a7f62", label="left")
        axes.bar_label(bars, fontsize=7)
        axes.set_ylabel(kind.name)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    legended = next((axes for axes, kind in zip(rows, found, strict=True) if kind.keeps_numbers), rows[0])
    legended.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.3))
    rows[-1].set_xticks(layers)
    rows[-1].set_xlabel("layer")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _label(axes: Axes, layers: int, heads: int) -> None:
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
