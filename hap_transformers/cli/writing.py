"""Writes what `hap prune` and `hap align` made: the model, and all that is known of it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import whole_files, write_text
from ..sensitivity import Sensitivity
from ..surgery.plan import PruningPlan
from .loading import Loaded


# What makes a folder that of an adapter or a sentence encoder.
OTHER_FORMS = (
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)


def write_pruned(
    folder: Path, loaded: Loaded, plan: PruningPlan, scores: Sensitivity | None, results: Mapping[str, Any]
) -> None:
    """Writes a pruned model with all that is known of it, whole or not at all.

    Args:
        folder (`Path`): Where to.
        loaded (`Loaded`): The pruned model.
        plan (`PruningPlan`): What was removed.
        scores (`Sensitivity`, *optional*): Scores of the dense model. Without them there is no page.
        results (`Mapping[str, Any]`): The fields of `results.json` that were measured.
    """
    # Matplotlib and Jinja are of use here alone.
    from ..reporting.card import base_model_of
    from ..reporting.hub import write_card
    from ..reporting.page import PAGE, write_report
    from ..reporting.ranks import head_ranks
    from ..reporting.results import public_name, versions

    base = base_model_of(loaded.model)
    about = {"model": public_name(loaded.name), "loader": loaded.loader}
    whole = {
        **about,
        **results,
        "head_ranks": head_ranks(loaded.model),
        "history": {},
        "training": {},
        "versions": versions(),
    }
    with whole_files(folder) as unfinished:
        loaded.save(unfinished)
        plan.save(unfinished / "pruning_plan.json")
        write_text(unfinished / "results.json", json.dumps(whole, indent=2) + "\n")
        if scores is not None:
            scores.model = ""  # The dense model is not kept.
            scores.save(unfinished / "sensitivity.safetensors")
            write_report(unfinished, name=folder.resolve().name)
        if (folder / "README.md").is_file():  # A card that somebody wrote is kept.
            shutil.copy(folder / "README.md", unfinished)
        card = {"base_model": base, "model_name": f"pruned {whole['model']}", "dataset": whole["task"]}
        write_card(loaded.model, unfinished, results=whole, plan=plan, loader=loaded.loader, **card)
        _remove_other_forms(folder, unfinished)
    if scores is None:  # Those of an earlier model.
        for name in (PAGE, "sensitivity.safetensors"):
            (folder / name).unlink(missing_ok=True)


def write_dense(folder: Path, loaded: Loaded, plan: PruningPlan | None = None) -> None:
    """Writes a model of which nothing was removed, whole or not at all, in place of all that tells of an earlier one.

    Args:
        folder (`Path`): Where to.
        loaded (`Loaded`): The model.
        plan (`PruningPlan`, *optional*): The empty plan.
    """
    from ..reporting.hub import remove_card
    from ..reporting.page import FILES, PAGE

    with whole_files(folder) as unfinished:
        loaded.save(unfinished)
        if plan is not None:
            plan.save(unfinished / "pruning_plan.json")
        remove_card(folder)
        _remove_other_forms(folder, unfinished)
        for name in (*FILES, PAGE):
            (folder / name).unlink(missing_ok=True)


def _remove_other_forms(folder: Path, unfinished: Path) -> None:
    """Removes files of an earlier model by which the new one would be read as an adapter or a sentence encoder."""
    for name in OTHER_FORMS:
        if not (unfinished / name).exists():
            (folder / name).unlink(missing_ok=True)
