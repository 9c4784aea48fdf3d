"""Evaluation results in the form that the Hub reads: files in the folder `.eval_results` of a repository."""

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub.utils import yaml_dump

from ..files import write_text
from ..surgery.plan import PruningPlan
from .wording import budget_in_words


FOLDER = ".eval_results"
# Old names of data sets, which the Hub redirects.
NAMESPACES = {"glue": "nyu-mll/glue"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MARK = "# Written by hap_transformers"


def write_eval_results(
    folder: str | Path,
    metrics: Mapping[str, float],
    dataset: str | None,
    config: str | None = None,
    plan: PruningPlan | None = None,
) -> list[Path]:
    """Writes a file per metric, and removes those of earlier results.

    Every value of a data set and configuration has a file of its own, because a file may hold one.

    Args:
        folder (`str` or `Path`): Folder of the model and its card.
        metrics (`Mapping[str, float]`): The pruned model's metrics. Losses are left out.
        dataset (`str`, *optional*): Name of the data on the Hub. Without one nothing is written.
        config (`str`, *optional*): Its configuration; by default `"default"`.
        plan (`PruningPlan`, *optional*): What was removed, for the notes.

    Returns:
        `list[Path]`: The files.
    """
    place = Path(folder) / FOLDER
    for old in place.glob("*.yaml"):
        if old.read_text(encoding="utf-8", errors="replace").startswith(MARK):
            old.unlink()
    dataset = NAMESPACES.get(dataset or "", dataset)
    named = {name: value for name, value in metrics.items() if not name.endswith("loss")}
    if dataset is None or not HUB_ID.fullmatch(dataset) or not named:
        return []
    place.mkdir(parents=True, exist_ok=True)
    task, files = config or "default", []
    for name, value in named.items():
        entry = {
            "dataset": {"id": dataset, "task_id": task},
            "value": float(value),
            "notes": f"{name}, {_removed_in_words(plan)}",
        }
        file = place / (re.sub(r"[^\w.-]", "_", f"{dataset.rpartition('/')[2]}_{task}_{name}") + ".yaml")
        write_text(file, f"{MARK}, which replaces this file.\n{yaml_dump([entry], sort_keys=False)}")
        files.append(file)
    return files


def _removed_in_words(plan: PruningPlan | None) -> str:
    if plan is None or plan.ratio is None:
        return "pruned"
    return f"{100 * plan.ratio:.3g} % of {budget_in_words(plan.budget)} removed"
