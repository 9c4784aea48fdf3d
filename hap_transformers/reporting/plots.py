"""Pictures of scores and structures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ..components.groups import KINDS, by_kind, find_groups
from ..files import whole_file
from ..sensitivity import Sensitivity
from ..surgery.plan import PruningPlan
from .costs import part_rows
from .ranks import head_ranks, left_of
from .wording import name_of_first


COLORS = ("#5e81ac", "#2a7f62", "#8fbc8f", "#c9a227", "#b0b8c1", "#bf616a")


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
    groups = [group for group in find_groups(model) if not group.kind.outside]
    found, layers = by_kind(groups), sorted({group.layer for group in groups})
    figure = Figure(figsize=(2.5 + 0.5 * len(layers), 2.1 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    legended: list[Axes] = []
    for axes, (kind, members) in zip(rows, found.items(), strict=True):
        places, counts = [group.layer for group in members], [left_of(group) for group in members]
        if dense := [
            count for _, count in counts if count is not None
        ]:  # Other kinds do not know how many there were.
            axes.bar(places, dense, color="#e5e9f0", label="removed")
            legended.append(axes)
        bars = axes.bar(places, [left for left, _ in counts], color="#2a7f62", label="left")
        axes.bar_label(bars, fontsize=7)
        axes.set_ylabel(kind.name)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    [*legended, rows[0]][0].legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.3))
    rows[-1].set_xticks(layers)
    rows[-1].set_xlabel("layer")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def plot_parts(results: Mapping[str, Any], path: str | Path) -> None:
    """Draws the parameters of the dense and the pruned model by part, a bar each, and saves it.

    Args:
        results (`Mapping[str, Any]`): Results with `parts`, as [`costs_of`] gives them.
        path (`str` or `Path`): Where to write the picture. The suffix sets the format.
    """
    rows = part_rows(results)
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes, before = figure.subplots(), np.zeros(2)
    for number, (label, dense, pruned, _) in enumerate(rows):
        counts = np.array([pruned, dense]) / 1e6
        axes.barh(
            ["pruned", name_of_first(results)], counts, left=before, color=COLORS[number % len(COLORS)], label=label
        )
        before += counts
    axes.set_xlabel("million parameters")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def plot_head_ranks(model: PreTrainedModel, path: str | Path) -> None:
    """Draws how many dimensions every head of a model has left, layers x heads for each kind, and saves it.

    Args:
        model (`PreTrainedModel`): A model whose heads have lost dimensions.
        path (`str` or `Path`): Where to write the picture. The suffix sets the format.

    Raises:
        ValueError: If the model's heads are whole.
    """
    members = [group for group in find_groups(model) if group.runs is not None]
    if not members:
        raise ValueError(
            f"The heads of this {type(model).__name__} are whole; plot_structure draws how many are left."
        )
    ranks, most = head_ranks(model), max(group.runs.whole.head_size for group in members if group.runs is not None)
    layers, heads = len(next(iter(ranks.values()))), max(map(len, next(iter(ranks.values()))))
    figure = Figure(figsize=((1.2 + 0.42 * heads) * len(ranks), 1.5 + 0.33 * layers), layout="constrained")
    panels = figure.subplots(1, len(ranks), squeeze=False)[0]
    for axes, (kind, rows) in zip(panels, ranks.items(), strict=True):
        whole = [[*row, *(heads - len(row)) * [np.nan]] for row in rows]  # A decoder may have fewer heads.
        image = axes.imshow(whole, vmin=0, vmax=most, cmap="YlGnBu", aspect="auto")
        for layer, row in enumerate(rows):
            for head, rank in enumerate(row):
                shade = "white" if rank > most / 2 else "black"
                axes.text(head, layer, str(rank), ha="center", va="center", fontsize=7, color=shade)
        _label(axes, layers, heads)
        axes.set_title(KINDS[kind].label, fontsize=9)
    figure.colorbar(image, ax=panels, label=f"dimensions left of {most}")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _label(axes: Axes, layers: int, heads: int) -> None:
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
