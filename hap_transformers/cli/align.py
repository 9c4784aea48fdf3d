"""`hap align`."""

from pathlib import Path
from typing import Annotated

import typer

from ..alignment.basis_name import basis_of
from .examples import load_examples
from .loading import load
from .options import Device, Json, Model, Passes, Source, print_result, require_own_folder, takes_settings
from .road import align as align_loaded


@takes_settings
def align(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for the aligned model.", show_default=False)],
    *,
    source: Source,
    passes: Passes,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    json_: Json = False,
) -> None:
    """Change the basis inside heads, so that `hap score` can score their dimensions. Outputs stay the same."""
    require_own_folder(output, model, overwrite)
    loaded = load(model, device, passes.embedding)
    examples = load_examples(loaded, source, source.max_examples)
    align_loaded(loaded, examples, source, passes, ["query_key_dims", "value_dims"])
    loaded.save(output)
    basis = basis_of(loaded.model.config)
    print_result({"basis": basis, "folder": str(output)}, [], f"heads are in the basis '{basis}': {output}", json_)
