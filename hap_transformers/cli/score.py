"""`hap score`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..components.groups import by_kind, find_groups
from ..sensitivity import METHODS, Sensitivity, estimate_sensitivity
from ..sensitivity.state_file import validate_state_file
from ..training.config import HapConfig
from .loading import load_model, text_batches, training_batches, validate_one_source
from .options import (
    HELP,
    Batch,
    Column,
    DataDir,
    Device,
    Encoding,
    Json,
    Length,
    MaxExamples,
    Model,
    Seed,
    Task,
    Texts,
    TrainFile,
    print_result,
    require_writable,
    table_by_layer,
)


def score(
    model: Model,
    task: Task = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    texts: Texts = None,
    column: Column = None,
    encoding: Encoding = None,
    method: Annotated[str, typer.Option(help=HELP["method"])] = HapConfig.method,
    max_examples: MaxExamples = HapConfig.max_examples,
    num_probes: Annotated[int, typer.Option(help=HELP["num_probes"], min=1)] = HapConfig.num_probes,
    tolerance: Annotated[float | None, typer.Option(help=HELP["tolerance"])] = HapConfig.tolerance,
    max_memory: Annotated[str | None, typer.Option(help=HELP["max_memory"])] = HapConfig.max_memory,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp16.")] = None,
    batch: Batch = 16,
    length: Length = None,
    seed: Seed = 0,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="File for the scores.")] = Path("sensitivity.safetensors"),
    state_file: Annotated[Path | None, typer.Option(help="File to resume from after an interruption.")] = None,
    json_: Json = False,
) -> None:
    """Score every component of a model, on a task's examples or on texts without labels."""
    validate_one_source(task, data_dir, train_file, texts, column)
    require_writable(output, Sensitivity.load, [train_file, state_file, *(texts or ())])
    if state_file is not None and state_file.absolute() == output.absolute():
        raise ValueError(f"--state-file and --output are both '{output}'; choose two files.")
    if state_file is not None:
        require_writable(state_file, validate_state_file, [train_file], "--state-file")
    loaded = load_model(model, device)
    batches: Iterable[Any] = ()
    if method not in METHODS or METHODS[method].sample is not None:
        batches = (
            text_batches(model, loaded, texts, column, max_examples, batch, length, seed, encoding)
            if texts
            else training_batches(
                model, loaded, task, data_dir, train_file, max_examples, batch, length, seed, encoding
            )
        )
    found = estimate_sensitivity(
        loaded,
        batches,
        method,
        num_probes=num_probes,
        tolerance=tolerance,
        max_memory=max_memory,
        precision=precision,
        seed=seed,
        state_file=state_file,
    )
    found.save(output)
    columns = {
        f"{kind.name}: lowest to highest score": {
            group.layer: _span(scores) for group, scores in zip(groups, found.scores[kind.name], strict=True)
        }
        for kind, groups in by_kind(find_groups(loaded, found.scores)).items()
    }
    reliability = "" if found.reliability is None else f", reliability {found.reliability:.2f}"
    title = f"{method} on {found.num_examples} examples{reliability}, on {loaded.device.type}: {output}"
    figures = {"method": method, "examples": found.num_examples, "reliability": found.reliability}
    print_result({**figures, "file": str(output)}, table_by_layer(columns), title, json_)


def _span(scores: torch.Tensor) -> str:
    return f"{scores.min():.2e} to {scores.max():.2e}" if len(scores) else ""
