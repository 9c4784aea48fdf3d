"""Formats what the study found as Markdown."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from glue_scripts.compare_glue.cells import Cell

from .cells import RATIOS, Key
from .methods import METHODS, NOTHING
from .networks import NETWORKS


Cells = Mapping[Key, Cell]

PHASES = {"pruned": "surgery", "refitted": "refit", "recovered": "recovery"}


def sections(cells: Cells, precision: dict[str, Any] | None) -> dict[str, str]:
    """The texts between the marks of `docs/cifar.md`."""
    found = {"dense": dense_text(cells), "results": "\n\n".join(phase_tables(cells)), "costs": costs_table(cells)}
    return {**found, "not run": not_run(cells), "precision": precision_table(precision)}


def dense_text(cells: Cells) -> str:
    """Says what the dense networks are."""
    lines = ["| network | accuracy, % | parameters | FLOPs |", "| --- |" + " --- |" * 3]
    for key, cell in cells.items():
        if key.method == NOTHING and not key.recovery_epochs:
            row = [key.network, f"{100 * cell['dense']['accuracy']:.1f}"]
            row += [f"{cell[name] / 1e6:.{digits}f} million" for name, digits in (("parameters", 2), ("flops", 0))]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def phase_tables(cells: Cells) -> list[str]:
    """Points over the dense network in each phase, and the divergence in the last; a table a recovery budget.

    With a recovery the share of the FLOPs that is left is there, too.
    """
    tables = []
    for epochs in sorted({key.recovery_epochs for key in cells}):
        budget = f" and {epochs:g} epochs of recovery at {_rates(cells, epochs)}" if epochs else ""
        header = ["network", f"method{budget}", *(f"{ratio:.0%}" for ratio in sorted(RATIOS))]
        rows = []
        for network, method, images in _lines(cells, epochs):
            if method == NOTHING and not epochs:
                continue
            found = [_of_seeds(cells, network, method, ratio, images, epochs) for ratio in sorted(RATIOS)]
            texts = [_points(of_ratio) + (_flops_left(of_ratio) if epochs else "") for of_ratio in found]
            rows.append([network, _named(cells, method, images), *texts])
        tables.append(_markdown(header, rows))
    return tables


def _rates(cells: Cells, epochs: float) -> str:
    """The learning rates of all recoveries of this length."""
    rates = {cell["recovery_learning_rate"] for key, cell in cells.items() if key.recovery_epochs == epochs}
    return ", ".join(f"{rate:g}" for rate in sorted(rates))


def costs_table(cells: Cells, ratio: float = RATIOS[0]) -> str:
    """What is left of the FLOPs and the time at a ratio, and the seconds of pruning."""
    header = ["network", f"method, {ratio:.0%}", "FLOPs left", "time left, batch 8 / 128"]
    header.append("seconds: score + plan (+ refit)")
    rows = []
    for network, method, images in _lines(cells, 0.0):
        found = _of_seeds(cells, network, method, ratio, images, 0.0)
        if found and method != NOTHING:
            flops = mean(cell["flops"] / cell["dense_flops"] for cell in found)
            times = " / ".join(f"{mean(c['latency'][size] for c in found):.2f}" for size in found[0]["latency"])
            seconds = " + ".join(
                f"{mean(cell['seconds'][name] for cell in found):.0f}" for name in found[0]["seconds"]
            )
            rows.append([network, _named(cells, method, images), f"{flops:.0%}", times, seconds])
    return _markdown(header, rows)


def not_run(cells: Cells) -> str:
    """The ratios that no seed was run at, by method and network."""
    rows = []
    for method in METHODS:
        if method == NOTHING:
            continue
        row = []
        for network in NETWORKS:
            ran = {key.ratio for key in cells if (key.network, key.method) == (network, method)}
            row.append(", ".join(f"{ratio:.0%}" for ratio in sorted(RATIOS) if ratio not in ran))
        rows += [[method, *row]] if any(row) else []
    return _markdown(["method", *NETWORKS], rows) if rows else "None."


def precision_table(precision: dict[str, Any] | None) -> str:
    """Formats what low precision changes."""
    if precision is None:
        return "These figures are open: `python -m vision_scripts.compare_cifar.low_precision` makes them."
    base = precision["rows"][0]
    header = ["precision", "seconds", "over float32", "peak memory, MB", "over float32", "rank correlation to float32"]
    rows = []
    for row in precision["rows"]:
        if "error" in row:
            rows.append([row["run"], "cannot run here", "", "", "", ""])
            continue
        text = [f"{row['seconds']:.0f}", f"{row['seconds'] / base['seconds']:.2f}"]
        # A process that held more memory before has no peak of its own.
        text += [f"{row['peak'] / 1e6:.0f}", f"{row['peak'] / base['peak']:.2f}" if base["peak"] else ""]
        rows.append([row["run"], *text, f"{row['rank_correlation']:.3f}" if "rank_correlation" in row else ""])
    settings = "{network}, {probes} probes on {images} images.".format_map(precision["settings"])
    return f"{settings}\n\n{_markdown(header, rows)}"


def _lines(cells: Cells, epochs: float) -> list[tuple[str, str, int]]:
    """Network, method and images of the refit of every line of a table, in the order of networks and methods."""
    found = {(key.network, key.method, key.refit_images) for key in cells if key.recovery_epochs == epochs}
    networks, methods = list(NETWORKS), list(METHODS)
    return sorted(found, key=lambda line: (networks.index(line[0]), methods.index(line[1]), line[2]))


def _named(cells: Cells, method: str, images: int) -> str:
    """A method, with the images of its refit where these differ between cells."""
    several = {key.refit_images for key in cells if key.method == method}
    return f"{method} ({images:,} images)" if len(several) > 1 else method


def _of_seeds(cells: Cells, network: str, method: str, ratio: float, images: int, epochs: float) -> list[Cell]:
    ratio = 0.0 if METHODS[method].plan is None else ratio
    wanted = (network, method, ratio, images, epochs)
    return [cell for key, cell in cells.items() if (*key[:3], *key[4:]) == wanted]


def _points(found: Sequence[Cell]) -> str:
    """Points over dense after each phase, means over seeds; their range after the last one; the last divergence."""
    if not found:
        return ""
    texts = []
    for phase in PHASES:
        if phase in found[0]:
            values = [100 * (cell[phase]["accuracy"] - cell["dense"]["accuracy"]) for cell in found]
            texts.append(f"{mean(values):+.1f}")
            kl = mean(cell[phase]["kl"] for cell in found)
    spread = f" ({min(values):+.1f} to {max(values):+.1f})" if len(values) > 1 else ""
    return f"{' → '.join(texts)}{spread}, KL {kl:.2f}"


def _flops_left(found: Sequence[Cell]) -> str:
    """The share of the dense network's FLOPs."""
    return f", FLOPs {mean(cell['flops'] / cell['dense_flops'] for cell in found):.0%}" if found else ""


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
