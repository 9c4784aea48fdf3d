"""`hap report`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, print_result


def report(
    folder: Annotated[Path, typer.Argument(help="Output folder of run_glue_hap.py.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="The page; by default report.html in the folder.")] = None,
    json_: Json = False,
) -> None:
    """Write one self-contained page about a run."""
    from ..reporting.page import write_report  # SciPy takes seconds to import, which other commands need not wait for.

    page = write_report(folder, output)
    print_result({"file": str(page)}, [], str(page), json_)
