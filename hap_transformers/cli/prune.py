"""`hap prune`."""

from pathlib import Path
from typing import Annotated

import typer

from ..efficiency import count_parameters
from ..refit.dense_copy import sharing_copy
from ..refit.reconstruct import reconstruct
from ..surgery.apply_plan import apply_plan
from ..surgery.plan import PruningPlan
from ..training.config import HapConfig
from .loading import load_model, saved_tokenizer, text_batches, training_batches, validate_one_source
from .options import (
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
    require_own_folder,
)


def prune(
    model: Model,
    plan: Annotated[Path, typer.Option(help="File written by `hap plan`.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for the pruned model.", show_default=False)],
    task: Task = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    texts: Texts = None,
    column: Column = None,
    encoding: Encoding = None,
    max_examples: MaxExamples = HapConfig.max_examples,
    batch: Batch = 16,
    length: Length = None,
    seed: Seed = 0,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    json_: Json = False,
) -> None:
    """Physically remove what a plan names. With a task, file or texts, refit the rest on them."""
    validate_one_source(task, data_dir, train_file, texts, column)
    require_own_folder(output, model, overwrite)
    loaded, chosen = load_model(model, device), PruningPlan.load(plan)
    tokenizer = saved_tokenizer(model, loaded)
    chosen.validate(loaded)
    empty = not any(chosen.count(kind) for kind in chosen.removed)
    refits = not empty and (task is not None or train_file is not None or bool(texts))
    batches = None
    if refits:
        batches = (
            text_batches(model, loaded, texts, column, max_examples, batch, length, seed, encoding)
            if texts
            else training_batches(
                model, loaded, task, data_dir, train_file, max_examples, batch, length, seed, encoding
            )
        )
    dense = sharing_copy(loaded)
    apply_plan(loaded, chosen)
    if batches is not None:
        reconstruct(loaded, dense, list(batches), init_implants=tuple(chosen.implants))
    loaded.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    chosen.save(output / "pruning_plan.json")
    parameters = {"dense": count_parameters(dense), "pruned": count_parameters(loaded)}
    refitted = "refitted" if refits else "not refitted (no --task, --train-file or --texts)"
    title = f"{parameters['pruned']:,} of {parameters['dense']:,} parameters left, {refitted}: {output}"
    if empty:
        title = f"The plan removes nothing; the model was copied unchanged: {output}"
    print_result({"parameters": parameters, "refitted": refits, "folder": str(output)}, [], title, json_)
