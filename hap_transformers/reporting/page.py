"""`report.html`: one self-contained page about a run of `run_glue_hap.py` or `hap prune`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..components.groups import KINDS
from ..files import write_text
from ..sensitivity import Sensitivity
from ..surgery.plan import PruningPlan
from ..version import __version__
from .costs import cost_rows, part_rows
from .wording import (
    budget_in_words,
    enumerated,
    fidelity_rows,
    label_of,
    loading_code,
    metric_names,
    name_of_first,
    recovery_in_words,
    slowness,
)


TEMPLATE = Path(__file__).with_name("page.html.jinja")
PAGE = "report.html"
FILES = ("results.json", "pruning_plan.json", "sensitivity.safetensors")
# What loads a model of run_glue_hap.py.
LOADER = "transformers.AutoModelForSequenceClassification"


def write_report(folder: str | Path, output: str | Path | None = None, name: str | None = None) -> Path:
    """Writes the page about a run: its settings, metrics and costs, what was removed, and how to load the model.

    The page needs no network and no other file.

    Args:
        folder (`str` or `Path`): The run's output folder, with the files in `FILES`.
        output (`str` or `Path`, *optional*): Where to write the page; by default `report.html` in the folder.
        name (`str`, *optional*): The page's title; by default the folder's name.

    Returns:
        `Path`: The page.

    Raises:
        FileNotFoundError: If the folder lacks a file.
        ValueError: If a file is not that of a run.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"'{folder}' lacks {', '.join(missing)}; it is no output folder of run_glue_hap.py "
            "or of hap prune --ratio."
        )
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{folder / 'results.json'}' is not JSON: {error}.") from error
    try:
        plan = PruningPlan.load(folder / "pruning_plan.json")
        scores = Sensitivity.load(folder / "sensitivity.safetensors")
        page = render_report(name or folder.resolve().name, results, plan, scores)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, jinja2.TemplateError) as error:
        raise ValueError(f"'{folder / 'results.json'}' is not that of a run: {error!r}.") from error
    output = Path(output or folder / PAGE)
    write_text(output, page)
    return output


def validate_page(file: Path) -> None:
    """Checks that a file is a page of [`write_report`], which may be replaced.

    Raises:
        ValueError: If it is not.
    """
    if "Written by hap_transformers" not in file.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"'{file}' is no page about a run.")


def render_report(name: str, results: Mapping[str, Any], plan: PruningPlan, scores: Sensitivity) -> str:
    """The page as HTML; see [`write_report`]."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    # A map has a column per number, so it shows components that keep their numbers.
    mapped = next((kind for kind in KINDS.values() if kind.keeps_numbers and kind.name in scores.scores), None)
    cells = score_cells(mapped.name, scores, plan) if mapped else []
    return template.render(
        name=name,
        results=results,
        phases=list(results["metrics"]),
        metrics=_metrics(results),
        costs=cost_rows(results),
        parts=part_rows(results),
        fidelity=fidelity_rows(results),
        first=name_of_first(results),
        recovery=recovery_in_words(results),
        loading=loading_code(results.get("loader", LOADER), name),
        warning=slowness(results),
        budget=budget_in_words(results["hap_config"]["budget"]),
        gone=_gone_in_words(plan),
        scores=scores,
        mapped=mapped,
        cells=cells,
        ranks={label_of(kind): _shaded(rows) for kind, rows in results.get("head_ranks", {}).items()},
        ranking=_ranking(cells),
        kinds=_of_layers(plan),
        layers=_layers(plan),
        implants=bool(plan.implants),
        curves=[(phase, _curve(log)) for phase, log in results.get("history", {}).items() if len(_losses(log)) > 1],
        version=__version__,
    )


def score_cells(kind: str, scores: Sensitivity, plan: PruningPlan) -> list[list[dict[str, Any]]]:
    """The scored components of a kind by layer: score, standard error, whether removed, and shade from 0 to 1."""
    by_layer, removed = scores.scores[kind], plan.removed.get(kind, {})
    flat = [float(score) for layer in by_layer for score in layer if score > 0]
    low, high = (math.log(end) for end in (min(flat), max(flat))) if flat else (0.0, 0.0)
    rows = []
    for layer, values in enumerate(by_layer):
        row = []
        for number, score in enumerate(map(float, values)):
            shade = (math.log(score) - low) / (high - low) if score > 0 and high > low else 0.0
            cell = {"score": score, "removed": number in removed.get(layer, ()), "shade": round(shade, 3)}
            row.append({**cell, "error": _error(kind, scores, layer, number)})
        rows.append(row)
    return rows


def _error(kind: str, scores: Sensitivity, layer: int, number: int) -> float | None:
    """The standard error of a score, as large a share of it as that of its trace."""
    if kind not in scores.traces or kind not in scores.stderr or not scores.traces[kind][layer][number]:
        return None
    relative = scores.stderr[kind][layer][number] / scores.traces[kind][layer][number]
    return abs(float(scores.scores[kind][layer][number]) * float(relative))


def _ranking(cells: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[int, int, float, bool]]:
    """Layer, number, score and whether removed of all cells, the most sensitive first."""
    ranked = [(i, j, cell["score"], cell["removed"]) for i, row in enumerate(cells) for j, cell in enumerate(row)]
    return sorted(ranked, key=lambda entry: -entry[2])


def _metrics(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every metric, losses last: its value in each phase, or `None`, with an interval where there is one."""
    intervals = results.get("intervals", {})
    return [
        {
            "name": metric,
            "values": [
                (values.get(metric), intervals.get(phase, {}).get(metric))
                for phase, values in results["metrics"].items()
            ],
        }
        for metric in metric_names(results["metrics"])
    ]


def _gone_in_words(plan: PruningPlan) -> str:
    """What a plan removes, such as "2 of 8 attention heads and 16 of 48 FFN neurons"."""
    return enumerated(
        f"{plan.count(kind):,} of {sum(counts):,} {label_of(kind)}" for kind, counts in plan.original.items() if counts
    )


def _shaded(ranks: Sequence[Sequence[int]]) -> list[list[tuple[int, float]]]:
    """Ranks of heads by layer, each with a shade from 0 to 1."""
    most = max((rank for row in ranks for rank in row), default=0) or 1
    return [[(rank, round(rank / most, 3)) for rank in row] for row in ranks]


def _of_layers(plan: PruningPlan) -> list[str]:
    """The kinds of a plan whose components lie in layers."""
    return [kind for kind in plan.original if kind not in KINDS or not KINDS[kind].outside]


def _layers(plan: PruningPlan) -> list[dict[str, Any]]:
    """For every layer, how many components of each kind it had and keeps, and its implant's rank.

    A kind is `None` where the plan does not record how many there were.
    """
    layers = []
    for layer in range(max(map(len, plan.original.values()), default=0)):
        kinds: dict[str, tuple[int, int] | None] = {}
        for kind, counts in ((kind, plan.original[kind]) for kind in _of_layers(plan)):
            gone = len(plan.removed.get(kind, {}).get(layer, ()))
            kinds[kind] = (counts[layer] - gone, counts[layer]) if layer < len(counts) else None
        layers.append({"kinds": kinds, "implant": plan.ranks.get(layer, 0)})
    return layers


def _losses(log: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]


def _curve(log: Sequence[Mapping[str, float]], width: int = 280, height: int = 120) -> dict[str, Any]:
    """Points of a curve of the training loss that fills a box, with the box's limits and the curve's ends."""
    losses = _losses(log)
    (first, start), (last, end) = losses[0], losses[-1]
    low, top = min(loss for _, loss in losses), max(loss for _, loss in losses)
    points = [
        (width * (step - first) / max(last - first, 1), height * (top - loss) / max(top - low, 1e-9))
        for step, loss in losses
    ]
    return {
        "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        **{"low": low, "top": top, "first": first, "last": last, "start": start, "end": end},
    }
