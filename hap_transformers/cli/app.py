"""The `hap` command: scores, plans, prunes and measures models from the shell."""

import copy
import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer


# The libraries are imported by the commands that need them: help and completion should not wait for them.
app = typer.Typer(
    help="Prunes Transformers by second-order sensitivity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(help="Hub name or folder of a model.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Task = Annotated[str | None, typer.Option(help="A GLUE task.", show_default=False)]
DataDir = Annotated[str | None, typer.Option(help="Folder with TASK/{train,validation}.parquet, instead of the Hub.")]
TrainFile = Annotated[str | None, typer.Option(help="Your own CSV or JSON file, with a 'label' column.")]
Batch = Annotated[int, typer.Option(help="Texts or images at once.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens of a text.", min=1)]
MaxExamples = Annotated[int, typer.Option(help="Training examples to look at.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the draw of examples, and of probes.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error comes from.")] = False,
) -> None:
    """Options of all commands."""


@app.command()
def info(model: Model, batch: Batch = 1, length: Length = 128, json_: Json = False) -> None:
    """Tell a model's heads and neurons a layer, parameters and FLOPs."""
    from ..components.groups import attention_blocks, feed_forward_blocks
    from ..efficiency import count_flops, count_parameters, example_inputs
    from .loading import load_model

    loaded = load_model(model, "cpu")
    heads, neurons = attention_blocks(loaded), feed_forward_blocks(loaded)
    figures: dict[str, Any] = {
        "model": model,
        "class": type(loaded).__name__,
        "heads": [block.num_components for block in heads],
        "dense_heads": [block.num_original_heads for block in heads],
        "neurons": [block.num_components for block in neurons],
        "implants": [block.implant_rank for block in neurons],
        "parameters": count_parameters(loaded),
        "flops": count_flops(loaded, example_inputs(loaded, batch, length)),
    }
    rows = [
        ["layer", "heads", "neurons", "implant"],
        *(
            [str(i), f"{h} of {d}", str(n), str(r) if r else ""]
            for i, (h, d, n, r) in enumerate(
                zip(*(figures[name] for name in ("heads", "dense_heads", "neurons", "implants")), strict=True)
            )
        ),
    ]
    title = f"{figures['class']}: {figures['parameters']:,} parameters, {figures['flops'] / 1e9:.2f} GFLOPs"
    _print(figures, rows, f"{title} for {batch} x {length} tokens", json_)


@app.command()
def score(
    model: Model,
    task: Task = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    method: Annotated[str, typer.Option(help="How to score.")] = "kronecker",
    max_examples: MaxExamples = 1024,
    num_probes: Annotated[int, typer.Option(help="Random probes a batch, for methods that draw any.", min=1)] = 4,
    tolerance: Annotated[float | None, typer.Option(help="Stop as soon as the reliability reaches this.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp16.")] = None,
    batch: Batch = 16,
    length: Length = 128,
    seed: Seed = 0,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="File for the scores.")] = Path("sensitivity.safetensors"),
    state_file: Annotated[Path | None, typer.Option(help="File to go on from after an interruption.")] = None,
    json_: Json = False,
) -> None:
    """Score every attention head and FFN neuron of a fine-tuned model."""
    from ..sensitivity.estimate import WITHOUT_DATA, estimate_sensitivity
    from .loading import load_model, training_batches

    _require_folder(output)
    loaded = load_model(model, device)
    data = task, data_dir, train_file
    batches: Iterable[Any] = ()
    if method not in WITHOUT_DATA:
        batches = training_batches(model, loaded, *data, max_examples, batch, length, seed)
    found = estimate_sensitivity(
        loaded,
        batches,
        method,
        num_probes=num_probes,
        tolerance=tolerance,
        precision=precision,
        seed=seed,
        state_file=state_file,
    )
    found.save(output)
    figures = {"method": method, "examples": found.num_examples, "reliability": found.reliability}
    rows = [["layer", "heads: lowest to highest score", "neurons: lowest to highest score"]]
    for layer, (heads, neurons) in enumerate(zip(found.heads or (), found.neurons or (), strict=True)):
        spans = [f"{own.min():.2e} to {own.max():.2e}" if len(own) else "" for own in (heads, neurons)]
        rows.append([str(layer), *spans])
    told = "" if found.reliability is None else f", reliability {found.reliability:.2f}"
    title = f"{method} on {found.num_examples} examples{told}, on {loaded.device.type}: {output}"
    _print({**figures, "file": str(output)}, rows, title, json_)


@app.command()
def plan(
    sensitivity: Annotated[Path, typer.Argument(help="File written by `hap score`.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="The model; by default the one that was scored.")] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="What the ratio is a share of: params, flops or latency of the encoder (embeddings and classifier "
            "stay), or heads."
        ),
    ] = "params",
    ratio: Annotated[float, typer.Option(help="Share to remove, in [0, 1).")] = 0.6,
    min_heads: Annotated[int | None, typer.Option(help="Heads every layer keeps at least.")] = None,
    min_neurons: Annotated[float | None, typer.Option(help="Share of neurons every layer keeps at least.")] = None,
    implant_ratio: Annotated[float, typer.Option(help="Share of removed neurons that linear maps replace.")] = 0.0,
    batch: Batch = 1,
    length: Length = 128,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="File for the plan.")] = Path("plan.json"),
    json_: Json = False,
) -> None:
    """Choose which heads and neurons go, to meet a budget."""
    from ..efficiency import count_encoder_parameters, count_parameters, example_inputs
    from ..planning.latency_table import LatencyTable
    from ..planning.plan_pruning import plan_pruning
    from ..sensitivity import Sensitivity
    from .loading import load_model

    _require_folder(output)
    scores = Sensitivity.load(sensitivity)
    if not (model or scores.model):
        raise ValueError(f"'{sensitivity}' does not say which model was scored; pass --model.")
    loaded = load_model(model or scores.model, device if budget == "latency" else "cpu")  # The rest is counted.
    inputs = example_inputs(loaded, batch, length) if budget in ("flops", "latency") else None
    made = plan_pruning(
        scores,
        loaded,
        budget=budget,
        ratio=ratio,
        min_heads=min_heads,
        min_neurons=min_neurons,
        implant_ratio=implant_ratio,
        inputs=inputs,
        latency_table=LatencyTable.measure(loaded, inputs) if budget == "latency" and inputs is not None else None,
    )
    made.save(output)
    gone = {"heads": made.num_heads, "neurons": sum(len(removed) for removed in made.neurons.values())}
    rows = [["layer", "heads removed", "neurons removed", "implant"]]
    for layer in range(len(made.original_heads)):
        counts = [len(made.heads.get(layer, ())), len(made.neurons.get(layer, ())), made.implants.get(layer, 0)]
        rows.append([str(count) if count else "" for count in (layer or "0", *counts)])
    whole, encoder, left = count_parameters(loaded), count_encoder_parameters(loaded), int(made.promise["parameters"])
    title = (
        f"{gone['heads']} heads and {gone['neurons']} neurons to remove: {output}\n"
        f"{left:,} of {whole:,} parameters will be left, {encoder - whole + left:,} of {encoder:,} in the encoder"
    )
    if budget == "latency":
        title += f"; latency is that of {loaded.device.type}"
    if not any(gone.values()):
        title = f"Nothing to remove: the model meets {budget} {ratio:.0%} already, as ratios are of the dense model"
        rows = []
    _print({"removed": gone, "promise": made.promise, "file": str(output)}, rows, title, json_)


@app.command()
def prune(
    model: Model,
    plan: Annotated[Path, typer.Option(help="File written by `hap plan`.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder for the pruned model.", show_default=False)],
    task: Task = None,
    data_dir: DataDir = None,
    train_file: TrainFile = None,
    max_examples: MaxExamples = 1024,
    batch: Batch = 16,
    length: Length = 128,
    seed: Seed = 0,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Remove what a plan names, for real; with a task or file, refit what is left on its examples."""
    from ..data.tasks import load_tokenizer
    from ..efficiency import count_parameters
    from ..refit.reconstruct import reconstruct
    from ..surgery.apply_plan import apply_plan
    from ..surgery.plan import PruningPlan
    from .loading import load_model, training_batches

    if data_dir and not task:
        raise ValueError("--data-dir needs --task.")
    loaded, chosen = load_model(model, device), PruningPlan.load(plan)
    tokenizer = None
    if loaded.main_input_name == "input_ids":
        with suppress(ValueError):  # What is not refitted needs none.
            tokenizer = load_tokenizer(model)
    chosen.validate(loaded)
    empty = not any([*chosen.heads.values(), *chosen.neurons.values()])
    refits = not empty and (task is not None or train_file is not None)
    batches = None
    if refits:
        batches = training_batches(model, loaded, task, data_dir, train_file, max_examples, batch, length, seed)
    dense = copy.deepcopy(loaded)
    apply_plan(loaded, chosen)
    if batches is not None:
        reconstruct(loaded, dense, list(batches), init_implants=tuple(chosen.implants))
    loaded.save_pretrained(output)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    chosen.save(output / "pruning_plan.json")
    parameters = {"dense": count_parameters(dense), "pruned": count_parameters(loaded)}
    refitted = "refitted" if refits else "not refitted (no --task or --train-file)"
    title = f"{parameters['pruned']:,} of {parameters['dense']:,} parameters left, {refitted}: {output}"
    if empty:
        title = f"The plan removes nothing; the model was copied unchanged: {output}"
    _print({"parameters": parameters, "refitted": refits, "folder": str(output)}, [], title, json_)


@app.command()
def bench(
    model: Model,
    pruned: Annotated[str, typer.Argument(help="The model to compare it with.", show_default=False)],
    batch: Batch = 8,
    length: Length = 128,
    device: Device = None,
    repeats: Annotated[int, typer.Option(help="Timed forward passes of each.", min=1)] = 15,
    json_: Json = False,
) -> None:
    """Time two models against each other, and count their parameters and FLOPs."""
    from ..efficiency import compare_latency, count_flops, count_parameters, example_inputs
    from .loading import load_model

    models = {"dense": load_model(model, device), "pruned": load_model(pruned, device)}
    inputs = example_inputs(models["dense"], batch, length)
    seconds = compare_latency(models, inputs, repeats, progress=True)
    figures: dict[str, dict[str, float]] = {
        "parameters": {name: count_parameters(own) for name, own in models.items()},
        "flops": {name: count_flops(own, inputs) for name, own in models.items()},
        "milliseconds": {name: round(1000 * value, 3) for name, value in seconds.items()},
    }
    names = [Path(name).name or name for name in (model, pruned)]
    rows = [["", *(names if len(set(names)) == 2 else (model, pruned)), "left"]]
    for name, own in figures.items():
        rows.append([name, *(f"{own[key]:,}" for key in ("dense", "pruned")), f"{own['pruned'] / own['dense']:.1%}"])
    where = models["dense"].device.type
    _print(figures, rows, f"{batch} x {length} tokens, medians of {repeats} passes on {where}", json_)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of run_glue_hap.py.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="The page; by default report.html in the folder.")] = None,
    json_: Json = False,
) -> None:
    """Write one self-contained page about a run."""
    from ..reporting.page import write_report

    page = write_report(folder, output)
    _print({"file": str(page)}, [], str(page), json_)


def _require_folder(file: Path) -> None:
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{file.parent}' for '{file.name}'; make it first.")


def _print(figures: dict[str, Any], rows: list[list[str]], title: str, as_json: bool) -> None:
    """Prints JSON for machines, or for people a line and a table."""
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    typer.echo(title)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def main() -> None:
    """Runs the command; what goes wrong is told in a line, with exit code 1."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"hap: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
