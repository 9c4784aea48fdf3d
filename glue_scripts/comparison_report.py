"""Tables and pictures of a grid of cells, as files."""

from pathlib import Path

from comparison_latency import measure_latencies
from comparison_methods import METHODS
from comparison_plots import plot_gains, plot_kept, plot_latency, plot_rank_correlations
from comparison_table import PHASES, Cell, axes_of, differences_table, seconds_table, table, write_csv

from hap_transformers import Sensitivity


def write_report(name: str, cells: list[Cell], folder: Path) -> str:
    """Writes `NAME.md`, `NAME.csv` and `NAME-*.png`, and returns the Markdown.

    Args:
        name (`str`): The grid's name.
        cells (`list[dict]`): Its cells.
        folder (`Path`): Where to write, and where scores lie.
    """
    methods, tasks, _ = axes_of(cells)
    phases = tuple(phase for phase in PHASES if all(phase in cell for cell in cells))
    text = table(cells)
    if "hap" in methods and len(methods) > 1:
        text += "\n\n" + differences_table(cells, "hap", phases[-1])
    text += "\n\n" + seconds_table(cells)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    write_csv(cells, folder / f"{name}.csv")
    latencies = measure_latencies(cells, folder / "latencies.json")
    plot_gains(cells, folder / f"{name}-gains.png", phases)
    plot_kept(cells, folder / f"{name}-kept.png")
    plot_latency(cells, latencies, folder / f"{name}-latency.png", phases[-1])
    folders = [f"{task}-{seed}" for task in tasks for seed in sorted({cell["seed"] for cell in cells})]
    if any(cell["fold"] for cell in cells):
        folders = [f"{own}-fold" for own in folders]
    names = list(dict.fromkeys(METHODS[method].score for method in methods))
    files = {own: [folder / "scores" / own / f"{score}.safetensors" for score in names] for own in folders}
    scored = [own for own in folders if all(file.exists() for file in files[own])]  # Of a grid cut short, not all.
    if scored:
        scores = {score: [Sensitivity.load(files[own][i]) for own in scored] for i, score in enumerate(names)}
        plot_rank_correlations(scores, folder / f"{name}-ranks.png")
    return text
