"""The `hap` command and its subcommands."""

import sys
from typing import Annotated

import typer
from typer.core import TyperOption

from ..components.groups import KINDS
from .align import align
from .bench import bench
from .errors import OPTIONS, in_options
from .info import info
from .plan import plan
from .prune import prune
from .report import report
from .score import score


COMPONENTS = ", ".join(kind.label for kind in KINDS.values())

app = typer.Typer(
    help=f"Prunes components of Transformers ({COMPONENTS}) by second-order sensitivity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Options of all commands."""
    OPTIONS.update(options_by_name())


for command in (info, align, score, plan, prune, bench, report):
    app.command()(command)


def options_by_name() -> dict[str, TyperOption]:
    """The options of all commands by name; those that share a name mean the same."""
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    return {each.name: each for command in commands for each in command.params if isinstance(each, TyperOption)}


def main() -> None:
    """Runs the command. An error is printed in one line, and the exit code is 1."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message = " ".join(str(error).split())
        if not message or isinstance(error, LookupError | AssertionError | AttributeError):  # They name no cause.
            message = f"{type(error).__name__}: {message}"
        message = in_options(message, OPTIONS)
        typer.echo(f"hap: {message}", err=True)
        sys.exit(1)
