"""`hap bench`."""

from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedModel

from ..efficiency import compare_latency, count_flops, count_parameters, example_inputs
from .loading import chosen_length, load_model
from .options import Batch, Device, Json, Length, Model, print_result


def bench(
    model: Model,
    pruned: Annotated[str, typer.Argument(help="The model to compare with.", show_default=False)],
    batch: Batch = 8,
    length: Length = None,
    device: Device = None,
    repeats: Annotated[int, typer.Option(help="Timed forward passes of each model.", min=1)] = 15,
    json_: Json = False,
) -> None:
    """Compare two models: their latency, parameters and FLOPs."""
    models = {"dense": load_model(model, device), "pruned": load_model(pruned, device)}
    if models["dense"].main_input_name != models["pruned"].main_input_name:
        raise ValueError(f"'{model}' and '{pruned}' take different inputs, so one batch cannot compare them.")
    length = chosen_length(length, *models.values())
    inputs = example_inputs(min(models.values(), key=_vocabulary), batch, length)
    seconds = compare_latency(models, inputs, repeats, progress=True)
    figures: dict[str, dict[str, float]] = {
        "parameters": {name: count_parameters(network) for name, network in models.items()},
        "flops": {name: count_flops(network, inputs) for name, network in models.items()},
        "milliseconds": {name: round(1000 * value, 3) for name, value in seconds.items()},
    }
    names = [Path(name).name or name for name in (model, pruned)]
    rows = [["", *(names if len(set(names)) == 2 else (model, pruned)), "left"]]
    for name, costs in figures.items():
        rows.append([name, *(f"{costs[key]:,}" for key in models), f"{costs['pruned'] / costs['dense']:.1%}"])
    device_type = models["dense"].device.type
    title = f"{batch} x {length} tokens, medians of {repeats} passes on {device_type}"
    if Path(model).exists() and Path(pruned).exists() and Path(model).samefile(pruned):
        title += "; both are the same model, so that the difference is noise"
    print_result(figures, rows, title, json_)


def _vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a model knows: those of the smaller vocabulary suit both."""
    return getattr(model.config, "vocab_size", 0)
