"""Formats what `benchmarks.embeddings` found as Markdown."""

import textwrap
from collections.abc import Iterable, Sequence
from statistics import mean

from glue_scripts.compare_glue.base_models import BASE_MODELS

from .embeddings_cells import (
    DENSE,
    ELSEWHERE,
    HEAVY,
    HOME,
    RATIOS,
    REFIT_EXAMPLES,
    REFIT_SIZES,
    Cell,
    Key,
    dense_key,
)
from .embeddings_methods import DEFAULT, METHODS, TUNED, WHOLE_HEADS


# What a figure is called, its factor, and its decimals.
FIGURES = {
    "spearman": ("STS-B, Spearman x 100", 100, 1),
    "cosine_stsb": ("cosine, STS-B", 1, 3),
    "cosine_sst2": ("cosine, SST-2", 1, 3),
    "cosine_cola": ("cosine, CoLA", 1, 3),
    "mrr_mrpc": ("MRR x 100, MRPC", 100, 1),
    "mrr_stsb": ("MRR x 100, STS-B", 100, 1),
}
# Points of STS-B's Spearman correlation that may be lost, by phase and ratio.
TARGETS = {"pruned": {0.6: 1.0, 0.8: 3.0, 0.9: 6.0}, "recovered": {0.6: 0.5, 0.8: 1.5}}

# What is said of a model; its tables.
NAMES = ("similarity", "distance and retrieval", "other text", "seconds")
OPEN = "These figures are open: `python -m benchmarks.embeddings` makes them."

Cells = dict[Key, Cell]


def sections(cells: Cells) -> dict[str, str]:
    """The texts between the marks of `docs/embeddings.md`."""
    models = [key.model for key in cells if key.method == DENSE]
    open_ones = [model for model in BASE_MODELS if model not in models]
    found = {f"{name} of {model}": OPEN for model in open_ones for name in NAMES}
    found |= {f"{name} of {model}": text for model in models for name, text in of_model(cells, model).items()}
    found["refit"] = "\n\n".join(sizes_table(cells, models[0], text) for text in (HOME, ELSEWHERE))
    found["recovery"] = recovery_table(cells, models[0])
    return found | {"targets": targets_text(cells, models)}


def measured_ratios(cells: Cells, model: str) -> list[float]:
    """The ratios that any cell of a model is of."""
    measured = {key.ratio for key in cells if key.model == model}
    return [ratio for ratio in RATIOS if ratio in measured]


def of_model(cells: Cells, model: str) -> dict[str, str]:
    """The tables of one model."""
    similarity = methods_table(cells, model, HOME, measured_ratios(cells, model), ["spearman"])
    other = [methods_table(cells, model, HOME, [ratio], list(FIGURES)[1:]) for ratio in HEAVY]
    elsewhere = methods_table(cells, model, ELSEWHERE, HEAVY, ["spearman", "cosine_stsb", "cosine_sst2"])
    return dict(zip(NAMES, (similarity, "\n\n".join(other), elsewhere, seconds_table(cells, model)), strict=True))


def methods_table(cells: Cells, model: str, text: str, ratios: Sequence[float], figures: Sequence[str]) -> str:
    """A row a method and a column a figure and ratio: means over seeds, and their range."""
    dense = cells[dense_key(model)]
    header = [f"calibrated on {text}", *(f"{FIGURES[name][0]}, {ratio:.0%}" for name in figures for ratio in ratios)]
    rows = [["the dense model", *(_spread([dense], name) for name in figures for _ in ratios)]]
    for method in METHODS:
        found = [
            _spread(_of_seeds(cells, Key(model, method, text, ratio, 0)), name) for name in figures for ratio in ratios
        ]
        rows += [[method, *found]] if any(found) else []
    return _markdown(header, rows)


def seconds_table(cells: Cells, model: str) -> str:
    """Seconds of scoring, planning and refit, means over seeds."""
    rows, ratios = [], measured_ratios(cells, model)
    for method in METHODS:
        row = [method]
        for ratio in ratios:
            found = [cell["seconds"] for cell in _of_seeds(cells, Key(model, method, HOME, ratio, 0))]
            phases = [phase for phase in ("align", "score", "plan", "refit", "tune") if found and phase in found[0]]
            row.append(" + ".join(f"{mean(seconds[phase] for seconds in found):.0f}" for phase in phases))
        rows += [row] if any(row[1:]) else []
    return _markdown(["seconds: (align +) score + plan + refit (+ tune)", *(f"{ratio:.0%}" for ratio in ratios)], rows)


def sizes_table(cells: Cells, model: str, text: str) -> str:
    """A row a number of sentences to refit on."""
    names = ["spearman", "cosine_stsb", "cosine_sst2"]
    columns = [(name, ratio) for name in names for ratio in HEAVY]
    header = [f"refitted on, {text}", *(f"{FIGURES[name][0]}, {ratio:.0%}" for name, ratio in columns)]
    rows = []
    for size in REFIT_SIZES:
        found = {ratio: _of_seeds(cells, Key(model, WHOLE_HEADS, text, ratio, 0, size)) for ratio in HEAVY}
        if not all(found.values()):
            continue
        seconds = " / ".join(f"{mean(cell['seconds']['refit'] for cell in found[ratio]):.0f}" for ratio in HEAVY)
        rows.append([f"{size:,} sentences", *(_spread(found[ratio], name) for name, ratio in columns), seconds])
    return _markdown([*header, f"refit, s, {' / '.join(f'{ratio:.0%}' for ratio in HEAVY)}"], rows)


def recovery_table(cells: Cells, model: str) -> str:
    """A row a setting of recovery, before which stands the pruned model."""
    settings = dict.fromkeys((key.learning_rate, key.hidden) for key in cells if key.phase == "recovered")
    if not settings:
        return OPEN
    columns = [(name, ratio) for name in ("spearman", "cosine_stsb", "mrr_mrpc") for ratio in HEAVY]
    header = ["recovery", *(f"{FIGURES[name][0]}, {ratio:.0%}" for name, ratio in columns), "seconds"]
    rows = []
    for rate, hidden in ((0.0, 0.0), *sorted(settings)):
        phase = "recovered" if rate else "pruned"
        words = f"at {rate:.0e}{', with hidden states' * (hidden > 0)}" if rate else "none"
        keys = {r: Key(model, DEFAULT, HOME, r, 0, REFIT_EXAMPLES, phase, rate, hidden) for r in HEAVY}
        found = {ratio: _of_seeds(cells, key) for ratio, key in keys.items()}
        seconds = [f"{mean(c['seconds'].get('recover', 0) for c in found[r]):.0f}" for r in HEAVY if found[r]]
        rows.append([words, *(_spread(found[ratio], name) for name, ratio in columns), " / ".join(seconds)])
    return _markdown(header, rows)


def targets_text(cells: Cells, models: Iterable[str]) -> str:
    """How far the default method is below the dense models, and the targets."""
    lines = []
    for model in models:
        for phase, targets in TARGETS.items():
            losses = {ratio: _losses(cells, model, phase, ratio) for ratio in targets}
            found = ", ".join(
                f"{mean(lost):.1f} at {ratio:.0%} (at most {targets[ratio]:.1f})"
                for ratio, lost in losses.items()
                if lost
            )
            if found:
                lines.append(f"{model}, {phase}: {found}.")
    lost = "Points of Spearman's correlation that the default method loses to the dense model, and the targets."
    return "\n".join(textwrap.fill(line, 119) for line in (lost, "", *(f"- {line}" for line in lines)))


def summary(cells: Cells, ratios: Sequence[float] = (0.6, 0.8, 0.9)) -> str:
    """One sentence a model: what the default method, whole heads and, where measured, tuned layers keep."""
    lines = []
    for model in BASE_MODELS:
        found = {
            method: [_of_seeds(cells, Key(model, method, HOME, ratio, 0)) for ratio in ratios]
            for method in (DEFAULT, WHOLE_HEADS, TUNED)
        }
        places = [i for i in range(len(ratios)) if found[DEFAULT][i] and found[WHOLE_HEADS][i]]
        if not places:
            continue
        dense = cells[dense_key(model)]["spearman"]
        kept = [
            " / ".join(f"{100 * mean(cell['spearman'] for cell in of_seeds[i]):.1f}" for i in places)
            for of_seeds in found.values()
            if all(of_seeds[i] for i in places)
        ]
        removed = " / ".join(f"{100 * ratios[i]:.0f}" for i in places)
        lines.append(
            f"With {removed} % of its encoder removed, without labels and without training, {model} keeps a rank "
            f"correlation of {kept[0]} on STS-B, of {100 * dense:.1f}; with whole heads in place of dimensions, "
            f"{kept[1]}{f'; with layers tuned one by one, as by default, {kept[2]}' if kept[2:] else ''}."
        )
    return textwrap.fill(" ".join(lines), 119)


def _losses(cells: Cells, model: str, phase: str, ratio: float) -> list[float]:
    """By seed; of several settings of recovery, those of the one that loses least on average."""
    dense = cells[dense_key(model)]["spearman"]
    by_setting: dict[tuple[float, float], list[float]] = {}
    for key, cell in cells.items():
        if key[:4] == (model, DEFAULT, HOME, ratio) and (key.refit_examples, key.phase) == (REFIT_EXAMPLES, phase):
            by_setting.setdefault((key.learning_rate, key.hidden), []).append(100 * (dense - cell["spearman"]))
    return min(by_setting.values(), key=mean, default=[])


def _of_seeds(cells: Cells, key: Key) -> list[Cell]:
    """The cells that differ from one in their seed only."""
    return [cell for other, cell in cells.items() if other._replace(seed=key.seed) == key]


def _spread(cells: Sequence[Cell], figure: str) -> str:
    """The mean of a figure, and its range over several seeds."""
    _, factor, decimals = FIGURES[figure]
    values = [factor * cell[figure] for cell in cells]
    if not values:
        return ""
    spread = f" ({min(values):.{decimals}f} to {max(values):.{decimals}f})" if len(values) > 1 else ""
    return f"{mean(values):.{decimals}f}{spread}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
