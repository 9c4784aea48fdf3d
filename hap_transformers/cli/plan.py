"""`hap plan`."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from ..components.forwards import eager_copy
from ..components.groups import by_kind
from ..data.tokenizers import longest_text
from ..efficiency import compare_latency, count_encoder_parameters, count_parameters, example_inputs
from ..forward_modes import device_name, validate_mode
from ..planning.settings import PlanningSettings
from ..reporting.wording import enumerated, no_faster
from ..sensitivity import Sensitivity
from ..surgery.apply_plan import apply_plan
from ..surgery.plan import PruningPlan
from .errors import warn
from .loading import LENGTH, load_model
from .options import (
    Batch,
    Device,
    Json,
    Length,
    Precision,
    print_result,
    require_writable,
    table_by_layer,
    takes_settings,
)
from .road import make_plan, nothing_to_remove


@takes_settings
def plan(
    sensitivity: Annotated[Path, typer.Argument(help="File written by `hap score`.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="The model; by default the one that was scored.")] = None,
    *,
    settings: PlanningSettings,
    batch: Batch = 1,
    length: Length = None,
    precision: Precision = None,
    device: Device = None,
    check_latency: Annotated[
        bool, typer.Option(help="Time the model before and after the plan, and warn if it is no faster.")
    ] = True,
    output: Annotated[Path, typer.Option(help="File for the plan.")] = Path("plan.json"),
    json_: Json = False,
) -> None:
    """Choose the components to remove to meet a budget."""
    require_writable(output, PruningPlan.load, [sensitivity])
    scores = Sensitivity.load(sensitivity)
    if not (model or scores.model):
        raise ValueError(f"'{sensitivity}' does not name the model that was scored; pass --model.")
    timed = settings.budget == "latency"
    check_latency = check_latency and not timed  # Such a plan promises a latency.
    loaded = load_model(model or scores.model, device if timed or check_latency else "cpu")
    if timed or check_latency:
        validate_mode(settings.latency_mode, loaded.device)
    made = make_plan(loaded, scores, settings, batch, length, precision)
    made.save(output)
    milliseconds = _checked(loaded, made, settings.latency_mode, precision, batch, length) if check_latency else None
    columns: dict[str, dict[int, str]] = {}
    for kind, groups in by_kind(made.groups_of(loaded)).items():
        gone = {group.layer: len(made.of_group(group)) for group in groups}
        columns[f"{kind.name} removed"] = {layer: str(count) if count else "" for layer, count in gone.items()}
    columns["implant"] = {layer: str(rank) for layer, rank in made.ranks.items()}
    rows = table_by_layer(columns)
    removed = {kind: made.count(kind) for kind in made.removed}
    counts = enumerated(f"{count} {kind}" for kind, count in removed.items())
    whole, encoder, left = count_parameters(loaded), count_encoder_parameters(loaded), int(made.promise["parameters"])
    title = (
        f"{counts} to remove: {output}\n"
        f"{left:,} of {whole:,} parameters will be left, {encoder - whole + left:,} of {encoder:,} in the encoder"
    )
    if timed:
        title += f"; latency was measured on {device_name(loaded.device)}, {settings.latency_mode}"
    if not any(removed.values()):
        title = nothing_to_remove(settings)
        rows = []
    figures: dict[str, Any] = {"removed": removed, "promise": made.promise, "file": str(output)}
    if milliseconds is not None:
        figures["milliseconds"] = milliseconds
    print_result(figures, rows, title, json_)


def _checked(
    model: PreTrainedModel, plan: PruningPlan, mode: str, precision: str | None, batch: int, length: int | None
) -> dict[str, float] | None:
    """Times a model against a copy that is pruned by a plan, and warns if the copy is no faster.

    Returns:
        `dict[str, float]` or `None`: Milliseconds of both, or nothing where nothing goes or nothing can be timed.
    """
    if not any(plan.count(kind) for kind in plan.removed):
        return None
    try:
        inputs = example_inputs(model, batch, length or min(LENGTH, longest_text(model)))
        pruned = eager_copy(model)
        apply_plan(pruned, plan)
        seconds = compare_latency({"dense": model, "pruned": pruned}, inputs, mode=mode, precision=precision)
    except (ValueError, torch.OutOfMemoryError) as error:  # The plan is good all the same.
        warn(f"The plan's latency was not checked: {error}")
        return None
    shape = " x ".join(map(str, next(iter(inputs.values())).shape))
    warning = no_faster(seconds["dense"], seconds["pruned"], shape, f"{device_name(model.device)}, {mode}")
    if warning:
        warn(warning)
    return {name: round(1000 * value, 3) for name, value in seconds.items()}
