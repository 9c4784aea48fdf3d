"""The results of a whole run: what `results.json` holds, the table for the terminal, and the other files."""

import copy
import json
import platform
from collections.abc import Mapping, Sized
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from transformers import PreTrainedModel

from ..components.groups import by_kind, find_groups
from ..efficiency import compare_latency
from ..files import write_text
from ..forward_modes import device_name
from ..version import __version__
from .costs import costs_of
from .page import write_report
from .plots import plot_head_sensitivity
from .ranks import head_ranks, left_of
from .wording import label_of, metric_cells, metric_names, recovery_in_words, slowness


if TYPE_CHECKING:  # The trainer imports this folder for its card.
    from ..training.stages import FinishedRun
    from ..training.trainer import HapTrainer


PICTURE = "head_sensitivity.png"
TRAINING_ARGUMENTS = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "bf16", "fp16")


def collect_results(
    trainer: "HapTrainer",
    run: "FinishedRun",
    inputs: Mapping[str, torch.Tensor],
    *,
    task: str,
    model: str,
    loader: str,
) -> dict[str, Any]:
    """Measures the costs of the dense and the pruned model, and returns all results of a run.

    Args:
        trainer (`HapTrainer`): The run's trainer, with the recovered model.
        run (`FinishedRun`): What the stages of the run left.
        inputs (`Mapping[str, torch.Tensor]`): The batch for FLOPs and latency, without labels.
        task (`str`): Name of the task.
        model (`str`): Name of the model that was fine-tuned; see [`public_name`].
        loader (`str`): The class that loads the pruned model, with its package.

    Returns:
        `dict[str, Any]`: The fields of `results.json`. Every process must call this; all get the same fields.
    """
    assert trainer.hap_config is not None  # A trainer without one cannot prune.
    splits = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    models = {"dense": run.dense, "pruned": cast(PreTrainedModel, trainer.model)}
    return {
        "task": task,
        "model": model,
        "loader": loader,
        "metrics": trainer.results["metrics"],
        "intervals": trainer.results.get("intervals", {}),
        "recovery": trainer.results.get("recovery"),
        **{name: trainer.results[name] for name in ("vocabulary",) if name in trainer.results},
        "num_examples": {split: len(cast(Sized, rows)) for split, rows in splits.items()},
        "components": _components(models),
        "head_ranks": head_ranks(models["pruned"]),
        **costs_of(models, inputs, _latency(models, inputs, trainer)),
        "batch": list(next(iter(inputs.values())).shape),
        "device": device_name(trainer.args.device),
        "reliability": run.sensitivity.reliability,
        "seconds": run.seconds,
        "seed": trainer.args.seed,
        "history": run.history,
        "hap_config": asdict(trainer.hap_config),
        "training": {name: getattr(trainer.args, name) for name in TRAINING_ARGUMENTS},
        "versions": versions(),
    }


def _components(models: Mapping[str, PreTrainedModel]) -> dict[str, dict[str, int]]:
    """What each model has of every kind that the pruned one consists of."""
    kinds = [kind.name for kind in by_kind(find_groups(models["pruned"]))]
    return {
        kind: {name: sum(left_of(group)[0] for group in find_groups(model, [kind])) for name, model in models.items()}
        for kind in kinds
    }


def versions() -> dict[str, str]:
    """The releases that a run used."""
    return {
        "hap_transformers": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _latency(
    models: Mapping[str, PreTrainedModel], inputs: Mapping[str, torch.Tensor], trainer: "HapTrainer"
) -> dict[str, float]:
    """Seconds of a forward pass in the trainer's precision, for models that it prepared and for others alike."""
    bare = {
        name: trainer.accelerator.unwrap_model(copy.deepcopy(model), keep_fp32_wrapper=False)
        for name, model in models.items()
    }
    with trainer.accelerator.autocast():
        return compare_latency(bare, inputs)


def public_name(model: str) -> str:
    """Returns a Hub name as it is, and of a folder only the last part: results do not say where they were made."""
    return Path(model).resolve().name if Path(model).exists() else model


def save_results(folder: Path, results: Mapping[str, Any], run: "FinishedRun") -> None:
    """Writes `results.json`, the scores, the plan, a picture of both, and `report.html`, the page about the run.

    Args:
        folder (`Path`): The run's output folder.
        results (`Mapping[str, Any]`): What [`collect_results`] returned.
        run (`FinishedRun`): What the stages of the run left.
    """
    run.sensitivity.model = ""  # The dense model is not kept.
    run.sensitivity.save(folder / "sensitivity.safetensors")
    run.plan.save(folder / "pruning_plan.json")
    if run.sensitivity.heads is not None:  # The card draws the ranks of heads that have lost dimensions.
        plot_head_sensitivity(run.sensitivity, folder / PICTURE, run.plan)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_report(folder)


def results_table(results: Mapping[str, Any]) -> str:
    """Formats the results as a table for the terminal, a row a phase, with notes below."""
    names = metric_names(results["metrics"])
    rows = [["", *names, *results["components"], "encoder", "parameters", "GFLOPs", "latency ms"]]
    for phase in results["metrics"]:
        size = "dense" if phase == "dense" else "pruned"
        rows.append(
            [phase]
            + metric_cells(results, phase)
            + [str(counts[size]) for counts in results["components"].values()]
            + [f"{results[key][size]:,}" for key in ("encoder_parameters", "parameters")]
            + [f"{results['flops'][size] / 1e9:.2f}", f"{results['latency_ms'][size]:.1f}"]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    batch = " x ".join(map(str, results["batch"]))
    title = f"{results['task']}: {results['num_examples']['validation']} validation examples; cost of a {batch} batch"
    return "\n".join(["", title, *lines, *_notes(results)])


def _notes(results: Mapping[str, Any]) -> list[str]:
    """Sentences on what the budget covers and on how sure the results are."""
    notes, config = [], results["hap_config"]
    if (recovery := recovery_in_words(results)) is not None:
        notes.append(recovery)
    if config["budget"] == "model":
        notes.append(f"Of all parameters {config['ratio']:.0%} were to go.")
    if config["budget"] == "params":
        notes.append(f"Of the encoder's parameters {config['ratio']:.0%} were to go; embeddings and classifier stay.")
    if any(results.get("intervals", {}).values()):
        notes.append("Brackets are 95 % bootstrap intervals over the validation examples.")
    if (rates := results.get("tokens_per_second")) is not None:
        notes.append(f"Generated tokens a second: {rates['dense']:.1f} dense, {rates['pruned']:.1f} pruned.")
    if warning := slowness(results):
        notes.append(warning)
    reliability = results["reliability"]
    if reliability is not None:
        first = label_of(next(iter(results["components"])))
        notes.append(
            f"Reliability of the ranking of {first}: {reliability:.2f} (1 repeats on another sample, 0 is noise)"
        )
    return notes
