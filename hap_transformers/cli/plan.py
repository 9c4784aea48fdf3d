"""`hap plan`."""

from pathlib import Path
from typing import Annotated

import typer

from ..components.groups import by_kind, find_groups
from ..efficiency import count_encoder_parameters, count_parameters, example_inputs
from ..planning.latency_table import LatencyTable
from ..planning.plan_pruning import plan_pruning
from ..planning.settings import PlanningSettings
from ..sensitivity import Sensitivity
from ..surgery.plan import PruningPlan
from .loading import chosen_length, load_model
from .options import Batch, Device, Json, Length, print_result, require_writable, table_by_layer, takes_settings


@takes_settings
def plan(
    sensitivity: Annotated[Path, typer.Argument(help="File written by `hap score`.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="The model; by default the one that was scored.")] = None,
    *,
    settings: PlanningSettings,
    batch: Batch = 1,
    length: Length = None,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="File for the plan.")] = Path("plan.json"),
    json_: Json = False,
) -> None:
    """Choose the components to remove to meet a budget."""
    require_writable(output, PruningPlan.load, [sensitivity])
    scores = Sensitivity.load(sensitivity)
    if not (model or scores.model):
        raise ValueError(f"'{sensitivity}' does not name the model that was scored; pass --model.")
    budget, timed = settings.budget, settings.budget == "latency"
    loaded = load_model(model or scores.model, device if timed else "cpu")  # Other budgets are only counted.
    inputs = example_inputs(loaded, batch, chosen_length(length, loaded)) if budget in ("flops", "latency") else None
    table = LatencyTable.measure(loaded, inputs) if timed and inputs is not None else None
    made = plan_pruning(scores, loaded, settings, inputs=inputs, latency_table=table)
    made.save(output)
    columns: dict[str, dict[int, str]] = {}
    for kind, groups in by_kind(find_groups(loaded)).items():
        gone = {group.layer: len(made.of_group(group)) for group in groups}
        columns[f"{kind.name} removed"] = {layer: str(count) if count else "" for layer, count in gone.items()}
    columns["implant"] = {layer: str(rank) for layer, rank in made.implants.items()}
    rows = table_by_layer(columns)
    removed = {kind: made.count(kind) for kind in made.removed}
    counts = " and ".join(f"{count} {kind}" for kind, count in removed.items())
    whole, encoder, left = count_parameters(loaded), count_encoder_parameters(loaded), int(made.promise["parameters"])
    title = (
        f"{counts} to remove: {output}\n"
        f"{left:,} of {whole:,} parameters will be left, {encoder - whole + left:,} of {encoder:,} in the encoder"
    )
    if timed:
        title += f"; latency was measured on {loaded.device.type}"
    if not any(removed.values()):
        title = (
            f"Nothing to remove: the model meets {budget} {settings.ratio:.0%} already. "
            "Ratios are shares of the dense model."
        )
        rows = []
    print_result({"removed": removed, "promise": made.promise, "file": str(output)}, rows, title, json_)
