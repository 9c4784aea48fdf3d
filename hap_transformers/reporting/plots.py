"""Pictures of scores and plans."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ..components.groups import attention_blocks, feed_forward_blocks
from ..files import whole_file
from ..sensitivity import Sensitivity
from ..surgery.plan import PruningPlan


def plot_head_sensitivity(
    sensitivity: Sensitivity, path: str | Path, plan: PruningPlan | None = None, title: str | None = None
) -> None:
    """Draws the head scores of a model not pruned before as a heat map, layers by heads, and saves it.

    Heads that `plan` removes are crossed out. Scores that are zero or negative (a Hutchinson estimate may be) take the
    palest colour.

    Args:
        sensitivity (`Sensitivity`): The scores; every layer must have all its heads.
        path (`str` or `Path`): Where to write the picture; the ending says the format.
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
    """Draws how many heads and neurons each layer of a model has left, and saves it.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture, pruned or not.
        path (`str` or `Path`): Where to write the picture; the ending says the format.
    """
    attention, feed_forward = attention_blocks(model), feed_forward_blocks(model)
    figure = Figure(figsize=(2.5 + 0.5 * len(attention), 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    layers = range(len(attention))
    upper.bar(layers, [block.num_original_heads for block in attention], color="#e5e9f0", label="removed")
    for axes, blocks, unit in ((upper, attention, "heads"), (lower, feed_forward, "neurons")):
        bars = axes.bar(layers, [block.num_components for block in blocks], color="#2a7f62", label="left")
        axes.bar_label(bars, fontsize=7)
        axes.set_ylabel(unit)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    upper.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.3))
    lower.set_xticks(layers)
    lower.set_xlabel("layer")
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _label(axes: Axes, layers: int, heads: int) -> None:
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
