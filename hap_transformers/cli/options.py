"""What the commands share: options, tables and printing."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..planning.settings import PlanningSettings
from ..training.config import HapConfig


# Help texts of options that are fields of a configuration; they are written there.
HELP: dict[str, str] = {field.name: field.metadata["help"] for field in fields(HapConfig)}

Model = Annotated[str, typer.Argument(help="Hub name or folder of a model.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Task = Annotated[str | None, typer.Option(help="A GLUE task.", show_default=False)]
DataDir = Annotated[str | None, typer.Option(help="Folder with TASK/{train,validation}.parquet, instead of the Hub.")]
TrainFile = Annotated[str | None, typer.Option(help="Custom CSV or JSON file with a 'label' column.")]
Batch = Annotated[int, typer.Option(help="Texts or images per batch.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens per text.", min=1)]
MaxExamples = Annotated[int, typer.Option(help=HELP["max_examples"], min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the sampled examples and of the probes.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")]


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command one option per field of `PlanningSettings`, in the place of its parameter `settings`."""
    types, given = get_type_hints(PlanningSettings), inspect.signature(command)
    settings = fields(PlanningSettings)

    @wraps(command)
    def with_options(**arguments: Any) -> None:
        chosen = {field.name: arguments.pop(field.name) for field in settings}
        command(settings=PlanningSettings(**chosen), **arguments)

    parameters: list[inspect.Parameter] = []
    for parameter in given.parameters.values():
        if parameter.name != "settings":
            parameters.append(parameter)
            continue
        for field in settings:
            option = typer.Option(field.default, help=field.metadata["help"])
            parameters.append(parameter.replace(name=field.name, default=option, annotation=types[field.name]))
    with_options.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_options


def require_folder(file: Path) -> None:
    """Refuses a file in a missing folder before any work is done.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{file.parent}' for '{file.name}'; make it first.")


def table_by_layer(columns: Mapping[str, Mapping[int, str]]) -> list[list[str]]:
    """A row per layer of columns that map layers to cells, below a row of the columns' names."""
    layers = sorted({layer for cells in columns.values() for layer in cells})
    rows = [[str(layer), *(cells.get(layer, "") for cells in columns.values())] for layer in layers]
    return [["layer", *columns], *rows]


def print_result(figures: Mapping[str, Any], rows: Sequence[Sequence[str]], title: str, as_json: bool) -> None:
    """Prints figures as JSON, or a title and a table."""
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    typer.echo(title)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
