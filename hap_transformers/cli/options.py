"""What the commands share: options, tables and printing."""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import typer

from ..components.groups import KINDS
from ..sensitivity import METHODS, SelfLoss
from ..sensitivity.self_loss import POOLINGS
from ..training.config import HapConfig


# Help texts of options that are fields of a configuration; they are written there.
HELP: dict[str, str] = {field.name: field.metadata["help"] for field in fields(HapConfig)}

Model = Annotated[str, typer.Argument(help="Hub name or folder of a model.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Task = Annotated[str | None, typer.Option(help="A GLUE task.", show_default=False)]
DataDir = Annotated[str | None, typer.Option(help="Folder with TASK/{train,validation}.parquet, instead of the Hub.")]
TrainFile = Annotated[str | None, typer.Option(help="Custom CSV or JSON file with a 'label' column.")]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        help="File of texts without labels, one a line or a table, or - for standard input; may be repeated."
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(help="Column of the texts in tables; by default the only one of words. Given twice: pairs of texts."),
]
Batch = Annotated[int, typer.Option(help="Texts or images per batch.", min=1)]
Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens per text; by default 128, or all that the model takes. Sentence encoders read texts up to their "
        "own maximum.",
        min=1,
    ),
]
Encoding = Annotated[str | None, typer.Option(help="Encoding of custom files, such as latin-1; by default UTF-8.")]
MaxExamples = Annotated[int, typer.Option(help=HELP["max_examples"], min=1)]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampled examples and of the probes.")]
Low = Literal["bf16", "fp16"]
Precision = Annotated[Low | None, typer.Option(help="bf16 or fp16 for autocast; by default the model's own dtype.")]


def _present(device: str | None) -> str | None:
    """Refuses a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own error asserts that it was built for the device.
        message = f"there is no device '{device}' for torch here. Leave --device out, or pass cpu."
        raise typer.BadParameter(message) from error
    return device


Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.", callback=_present)]
TuningEpochs = Annotated[int | None, typer.Option(help=HELP["tuning_epochs"], min=0)]
RefitExamples = Annotated[int, typer.Option(help=HELP["refit_examples"], min=1)]


@dataclass
class Source:
    """Options that name the examples, and say how many are used and how.

    Raises:
        ValueError: If several sources are named, or a folder without a task or a column without texts.
    """

    task: Task = None
    data_dir: DataDir = None
    train_file: TrainFile = None
    texts: Texts = None
    column: Column = None
    encoding: Encoding = None
    max_examples: MaxExamples = HapConfig.max_examples
    batch: Batch = 16
    length: Length = None
    seed: Seed = 0

    def __post_init__(self):
        named = {"--task": self.task, "--train-file": self.train_file, "--texts": self.texts}
        given = [flag for flag, value in named.items() if value]
        if len(given) > 1:
            raise ValueError(f"Pass either {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}.")
        if self.data_dir and not self.task:
            raise ValueError("--data-dir needs --task.")
        if self.column and not self.texts:
            raise ValueError("--column is that of --texts; pass a file.")

    @property
    def named(self) -> bool:
        """Whether there are any examples."""
        return bool(self.task or self.train_file or self.texts)


@dataclass
class Passes:
    """Options that say how a model runs forward and backward on examples."""

    num_probes: Annotated[int, typer.Option(help=HELP["num_probes"], min=1)] = HapConfig.num_probes
    exact_directions: Annotated[int, typer.Option(help=HELP["exact_directions"], min=0)] = HapConfig.exact_directions
    precision: Annotated[Low | None, typer.Option(help="Of passes: bf16 or fp16, in a refit bf16 only.")] = None
    pooling: Annotated[
        str | None,
        typer.Option(help=f"How a model without a head pools its tokens: {', '.join(POOLINGS)}. By default mean."),
    ] = None
    normalize: Annotated[bool, typer.Option(help="Divide such embeddings by their norm.")] = True

    @property
    def embedding(self) -> SelfLoss | None:
        """The loss of embeddings made otherwise than by default."""
        return None if self.pooling is None and self.normalize else SelfLoss(self.pooling, self.normalize)


@dataclass
class Scoring(Passes):
    """Options that say how components are scored."""

    method: Annotated[str, typer.Option(help=HELP["method"])] = HapConfig.method
    components: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Kind of component that may go: {', '.join(KINDS)}; may be repeated. By default heads "
            "and neurons. By kronecker, value_dims and query_key_dims go in place of heads that are aligned, as hap "
            "prune does to them, but not where queries are rotated.",
            show_default=False,
        ),
    ] = None
    tolerance: Annotated[float | None, typer.Option(help=HELP["tolerance"])] = HapConfig.tolerance
    max_memory: Annotated[str | None, typer.Option(help=HELP["max_memory"])] = HapConfig.max_memory

    @property
    def needs_examples(self) -> bool:
        """Whether the method looks at any; an unknown one is named when it is used."""
        return self.method not in METHODS or METHODS[self.method].sample is not None


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command one option per field of each of its keyword parameters that is a dataclass, in its place.

    A field that the command has as a parameter of its own is left to it, and keeps its default in the dataclass.
    """
    given, types = inspect.signature(command), get_type_hints(command, include_extras=True)
    own = {name for name in given.parameters if not is_dataclass(types.get(name))}
    groups = {name: types[name] for name in given.parameters if name not in own}
    taken = {name: [field for field in fields(group) if field.name not in own] for name, group in groups.items()}

    @wraps(command)
    def with_options(**arguments: Any) -> None:
        made = {
            name: group(**{field.name: arguments.pop(field.name) for field in taken[name]})
            for name, group in groups.items()
        }
        command(**made, **arguments)

    parameters: list[inspect.Parameter] = []
    for name, parameter in given.parameters.items():
        if name in own:
            parameters.append(parameter)
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        for field in taken[name]:
            help_text = field.metadata.get("help")
            default = typer.Option(field.default, help=help_text) if help_text else field.default
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=hints[field.name]))
    with_options.__signature__ = given.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_options


def require_writable(
    file: Path, load: Callable[[Path], Any], inputs: Sequence[str | Path | None] = (), option: str = "--output"
) -> None:
    """Refuses an output file that could not be written, or would replace something else, before any work is done.

    Args:
        file (`Path`): The file to write.
        load (`Callable`): Loads such a file. A file that it does not load is not replaced.
        inputs (`Sequence`, *optional*): Files that the command reads.
        option (`str`, *optional*, defaults to `"--output"`): The option that names the file.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the path is a folder, one of the inputs, or another kind of file.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{file.parent}' for '{file.name}'; make it first.")
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(f"The folder '{file.parent}' cannot be written to; choose another {option}.")
    if file.is_dir():
        raise ValueError(f"'{file}' is a folder; name a file with {option}.")
    for source in inputs:
        if source is not None and file.exists() and Path(source).exists() and file.samefile(source):
            raise ValueError(f"{option} '{file}' is a file that this command reads; choose another.")
    if file.is_file() and file.stat().st_size:  # A device such as /dev/null is none.
        try:
            load(file)
        except Exception as error:
            raise ValueError(f"{option} '{file}' exists and is no file of this kind; name another file.") from error


def require_own_folder(folder: Path, model: str, overwrite: bool) -> None:
    """Refuses to write a model over the one that is read, or over another one without being told to.

    Raises:
        ValueError: If the folder is that of the model, holds another one, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output '{folder}' is a file; name a folder.")
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PermissionError(f"--output '{folder}' cannot be written below '{above}'; choose another.")
    if folder.exists() and Path(model).exists() and folder.samefile(model):
        raise ValueError(
            f"--output '{folder}' is the folder of the model, which the pruned one would replace. Choose another."
        )
    names = ("config.json", "modules.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin")
    beside = ("pruning_plan.json", "tokenizer*.json", "vocab.*", "*.model")
    results = ("results.json", "report.html")
    for what, patterns in (("a model", names), ("a plan or tokenizer", beside), ("results of a run", results)):
        if not overwrite and any(next(folder.glob(name), None) for name in patterns):
            raise ValueError(
                f"--output '{folder}' holds {what}. Choose another folder, or pass --overwrite to replace it."
            )


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
