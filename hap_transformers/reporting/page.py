"""`report.html`: one self-contained page of a run of `run_glue_hap.py`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from scipy.stats import binomtest

from ..files import write_text
from ..sensitivity import Sensitivity
from ..surgery.plan import PruningPlan
from ..version import __version__
from .card import BUDGETS
from .card import COSTS as CARD_COSTS


TEMPLATE = Path(__file__).with_name("page.html.jinja")
FILES = ("results.json", "pruning_plan.json", "sensitivity.safetensors")
COSTS = {**CARD_COSTS, "bytes": "size on disk"}
CORRELATIONS = ("pearson", "spearmanr", "matthews_correlation")


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run: what was asked, what it cost, what went and what is left, and how to load it.

    The page needs no network and no other file.

    Args:
        folder (`str` or `Path`): The run's output folder, with the files in `FILES`.
        output (`str` or `Path`, *optional*): Where to write the page; by default `report.html` in the folder.

    Returns:
        `Path`: The page.

    Raises:
        FileNotFoundError: If the folder lacks a file.
        ValueError: If a file is not what it should be.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"'{folder}' lacks {', '.join(missing)}; it is no output folder of run_glue_hap.py.")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        plan = PruningPlan.load(folder / "pruning_plan.json")
        scores = Sensitivity.load(folder / "sensitivity.safetensors")
        page = render_report(folder.resolve().name, results, plan, scores)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, jinja2.TemplateError) as error:
        raise ValueError(f"'{folder / 'results.json'}' is not that of a run: {error!r}.") from error
    output = Path(output or folder / "report.html")
    write_text(output, page)
    return output


def render_report(name: str, results: Mapping[str, Any], plan: PruningPlan, scores: Sensitivity) -> str:
    """The page as HTML; see [`write_report`]."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    count = results["num_examples"]["validation"]
    metrics = [
        {
            "name": metric,
            "values": [(own[metric], interval(metric, own[metric], count)) for own in results["metrics"].values()],
        }
        for metric in sorted(next(iter(results["metrics"].values())), key="loss".__eq__)  # The loss last.
    ]
    return template.render(
        name=name,
        results=results,
        plan=plan,
        scores=scores,
        phases=list(results["metrics"]),
        metrics=metrics,
        costs=[
            (
                label,
                *(_short(key, results[key][size]) for size in ("dense", "pruned")),
                results[key]["pruned"] / results[key]["dense"],
            )
            for key, label in COSTS.items()
            if key in results
        ],
        heads=head_cells(scores, plan),
        layers=_layers(plan),
        budget=BUDGETS.get(results["hap_config"]["budget"], results["hap_config"]["budget"]),
        implants=any(plan.implants.values()),
        ranking=_ranking(scores, plan),
        curves=[(phase, _curve(log)) for phase, log in results.get("history", {}).items() if len(_losses(log)) > 1],
        version=__version__,
    )


def interval(metric: str, value: float, count: int) -> tuple[float, float] | None:
    """A 95 % confidence interval of a metric over validation examples, or `None` where its name tells none.

    Of an accuracy Wilson's; of a correlation Fisher's, which for Matthews' and Spearman's is an approximation.

    Args:
        metric (`str`): The metric's name.
        value (`float`): Its value.
        count (`int`): Number of examples.
    """
    if metric == "accuracy":
        found = binomtest(round(value * count), count).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    if metric in CORRELATIONS and count > 3 and abs(value) < 1:
        centre, width = math.atanh(value), 1.96 / math.sqrt(count - 3)
        return math.tanh(centre - width), math.tanh(centre + width)
    return None


def head_cells(scores: Sensitivity, plan: PruningPlan) -> list[list[dict[str, Any]]]:
    """Every head that was scored, layer by layer: its score, standard error, fate, and shade from 0 to 1."""
    flat = [float(score) for layer in scores.heads or () for score in layer if score > 0]
    low, high = (math.log(end) for end in (min(flat), max(flat))) if flat else (0.0, 0.0)
    rows = []
    for layer, own in enumerate(scores.heads or ()):
        row = []
        for head, score in enumerate(map(float, own)):
            error = None
            if scores.head_traces and scores.head_stderr and scores.head_traces[layer][head]:
                relative = float(scores.head_stderr[layer][head] / scores.head_traces[layer][head])
                error = abs(score * relative)
            shade = (math.log(score) - low) / (high - low) if score > 0 and high > low else 0.0
            removed = head in plan.heads.get(layer, ())
            row.append({"score": score, "error": error, "removed": removed, "shade": round(shade, 3)})
        rows.append(row)
    return rows


def _layers(plan: PruningPlan) -> list[dict[str, int]]:
    """How many heads and neurons every layer had and has, and the ranks of implants."""
    layers = []
    for layer, heads in enumerate(plan.original_heads):
        neurons = plan.num_neurons[layer] if plan.num_neurons else 0
        layers.append(
            {
                "heads": heads,
                "heads_left": heads - len(plan.heads.get(layer, ())),
                "neurons": neurons,
                "neurons_left": neurons - len(plan.neurons.get(layer, ())),
                "implant": plan.implants.get(layer, 0),
            }
        )
    return layers


def _ranking(scores: Sensitivity, plan: PruningPlan) -> list[tuple[int, int, float, bool]]:
    """Layer, number, score and fate of all heads, the most sensitive first."""
    cells = head_cells(scores, plan)
    ranked = [(i, j, cell["score"], cell["removed"]) for i, row in enumerate(cells) for j, cell in enumerate(row)]
    return sorted(ranked, key=lambda entry: -entry[2])


def _losses(log: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]


def _curve(log: Sequence[Mapping[str, float]], width: int = 280, height: int = 120) -> dict[str, Any]:
    """Points of a curve of the training loss that fills a box, and what the box's edges and the curve's ends are."""
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


def _short(key: str, value: float) -> str:
    if key == "bytes":
        return f"{value / 1e6:.1f} MB"
    if key == "flops":
        return f"{value / 1e9:.2f} G"
    return f"{value:,.1f}" if key == "latency_ms" else f"{value:,}"
