"""`hap bench`."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from ..efficiency import compare_latency, count_flops, count_parameters, example_inputs
from ..forward_modes import MODES, device_name, validate_mode
from .loading import chosen_length, load_model, size_in_words
from .options import Device, Json, Length, Model, Precision, print_result


Costs = dict[str, float]
Batches = Annotated[list[int], typer.Option(help="Texts or images per batch; several may be given.", min=1)]
Modes = Annotated[list[str], typer.Option(help=f"How models run: {', '.join(MODES)}; several may be given.")]
BATCHES, MODE = [8], ["eager"]  # Those that are measured by default.


def bench(
    model: Model,
    pruned: Annotated[str, typer.Argument(help="The model to compare with.", show_default=False)],
    batch: Batches = BATCHES,
    length: Length = None,
    mode: Modes = MODE,
    precision: Precision = None,
    device: Device = None,
    repeats: Annotated[int, typer.Option(help="Timed forward passes of each model.", min=1)] = 15,
    json_: Json = False,
) -> None:
    """Compare two models: their latency, parameters and FLOPs, over batch sizes and modes."""
    for name in mode:
        validate_mode(name)
    models = {"dense": load_model(model, device), "pruned": load_model(pruned, device)}
    for name in mode:
        validate_mode(name, models["dense"].device)
    if models["dense"].main_input_name != models["pruned"].main_input_name:
        raise ValueError(f"'{model}' and '{pruned}' take different inputs, so one batch cannot compare them.")
    length = chosen_length(length, *models.values())
    runs = []
    for size, way in product(dict.fromkeys(batch), dict.fromkeys(mode)):
        inputs = example_inputs(min(models.values(), key=_vocabulary), size, length)
        seconds = compare_latency(models, inputs, repeats, mode=way, precision=precision, progress=True)
        milliseconds = {name: round(1000 * value, 3) for name, value in seconds.items()}
        flops: Costs = {name: count_flops(network, inputs) for name, network in models.items()}
        runs.append({"batch": size, "mode": way, "flops": flops, "milliseconds": milliseconds})
    parameters: Costs = {name: count_parameters(network) for name, network in models.items()}
    names = [Path(name).name or name for name in (model, pruned)]
    names = names if len(set(names)) == 2 else [model, pruned]
    figures, rows = (_one if len(runs) == 1 else _several)(parameters, runs, names)
    sizes = size_in_words(models["dense"], length, runs[0]["batch"] if len(runs) == 1 else None)
    title = f"{sizes}, medians of {repeats} passes on {device_name(models['dense'].device)}"
    if Path(model).exists() and Path(pruned).exists() and Path(model).samefile(pruned):
        title += "; both are the same model, so that the difference is noise"
    print_result(figures, rows, title, json_)


def _one(parameters: Costs, runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> tuple[Any, list[list[str]]]:
    """All costs of one batch in one mode: the figures, and a row a cost."""
    (run,) = runs
    figures = {"parameters": parameters, "flops": run["flops"], "milliseconds": run["milliseconds"]}
    return figures, [["", *names, "left"], *([name, *_cells(costs)] for name, costs in figures.items())]


def _several(
    parameters: Costs, runs: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[Any, list[list[str]]]:
    """The parameters, and the milliseconds of all batches and modes: the figures, and a row a run."""
    rows = [["batch", "mode", *names, "left"], ["", "parameters", *_cells(parameters)]]
    rows += [[str(run["batch"]), f"{run['mode']}, ms", *_cells(run["milliseconds"])] for run in runs]
    return {"parameters": parameters, "runs": list(runs)}, rows


def _cells(costs: Mapping[str, float]) -> list[str]:
    return [*(f"{value:,}" for value in costs.values()), f"{costs['pruned'] / costs['dense']:.1%}"]


def _vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a model knows: those of the smaller vocabulary suit both."""
    return getattr(model.config, "vocab_size", 0)
