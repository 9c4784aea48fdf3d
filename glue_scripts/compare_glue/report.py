"""Tables and pictures of a grid of cells, as files."""

from pathlib import Path

from hap_transformers import Sensitivity

from .cells import PHASES, Cell, axes_of, write_csv
from .latency import measure_latencies
from .methods import DEFAULT, METHODS
from .plots import plot_gains, plot_kept, plot_latency, plot_rank_correlations
from .settings import COMPONENTS, SCORES
from .table import differences_table, seconds_table, table


def write_report(name: str, cells: list[Cell], folder: Path) -> str:
    """Writes `NAME.md`, `NAME.csv` and `NAME-*.png`, and returns the Markdown.

    Args:
        name (`str`): The grid's name.
        cells (`list[dict]`): The grid's cells.
        folder (`Path`): The folder to write to, which has the scores, too.
    """
    methods, _, _ = axes_of(cells)
    phases = tuple(phase for phase in PHASES if all(phase in cell for cell in cells))
    text = table(cells)
    if DEFAULT in methods and len(methods) > 1:
        text += "\n\n" + differences_table(cells, DEFAULT, phases[-1])
    text += "\n\n" + seconds_table(cells)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    write_csv(cells, folder / f"{name}.csv")
    latencies = measure_latencies(cells, folder / "latencies.json")
    plot_gains(cells, folder / f"{name}-gains.png", phases)
    plot_kept(cells, folder / f"{name}-kept.png")
    plot_latency(cells, latencies, folder / f"{name}-latency.png", phases[-1])
    scores = _load_scores(cells, folder / "scores")
    if scores:
        plot_rank_correlations(scores, folder / f"{name}-ranks.png")
    return text


def _load_scores(cells: list[Cell], folder: Path) -> dict[str, list[Sensitivity]]:
    """Scores of heads and neurons by scoring method, of the tasks and seeds that have all of them.

    A grid cut short may have none.
    """
    methods, tasks, _ = axes_of(cells)
    scores = [METHODS[method].score for method in methods]
    named = {score.method: score.name for score in scores if score.components == COMPONENTS}
    end = "-fold" if any(cell["fold"] for cell in cells) else ""
    folder = folder / cells[0]["model"]
    jobs = [f"{task}-{seed}{end}" for task in tasks for seed in sorted({cell["seed"] for cell in cells})]
    files = [[folder / job / name / SCORES for name in named.values()] for job in jobs]
    whole = [of_job for of_job in files if all(file.exists() for file in of_job)]
    if not whole:
        return {}
    return {name: [Sensitivity.load(of_job[i]) for of_job in whole] for i, name in enumerate(named)}
