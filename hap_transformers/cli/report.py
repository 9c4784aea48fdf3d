"""`hap report`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, print_result, require_writable


def report(
    folder: Annotated[
        Path, typer.Argument(help="Output folder of run_glue_hap.py or of `hap prune --ratio`.", show_default=False)
    ],
    output: Annotated[Path | None, typer.Option(help="The page; by default report.html in the folder.")] = None,
    json_: Json = False,
) -> None:
    """Write one self-contained page about a run."""
    from ..reporting.page import FILES, validate_page, write_report  # Jinja is of use to this command alone.

    require_writable(output or folder / "report.html", validate_page, [folder / name for name in FILES])
    page = write_report(folder, output)
    print_result({"file": str(page)}, [], str(page), json_)
