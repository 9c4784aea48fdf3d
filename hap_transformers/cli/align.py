"""`hap align`."""

from pathlib import Path
from typing import Annotated

import typer

from ..alignment.basis_name import basis_of
from ..components.groups import KINDS
from ..reporting.wording import words_for
from .examples import load_examples
from .loading import load
from .options import Device, Json, Model, Passes, Source, print_result, require_own_folder, takes_settings
from .road import align as align_loaded
from .writing import write_dense


ALIGNED = [name for name, kind in KINDS.items() if kind.basis]


@takes_settings
def align(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for the aligned model.", show_default=False)],
    *,
    source: Source,
    passes: Passes,
    components: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Kind of dimension to align: {', '.join(ALIGNED)}; may be repeated. By default those of heads.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    json_: Json = False,
) -> None:
    """Change the basis inside heads or embeddings, so that `hap score` can score dimensions. Outputs stay the same."""
    kinds = components or [name for name in ALIGNED if KINDS[name].instead_of]
    if unknown := sorted(set(kinds) - set(ALIGNED)):
        raise ValueError(f"--components names {', '.join(unknown)}; what has a basis are {', '.join(ALIGNED)}.")
    require_own_folder(output, model, overwrite)
    loaded = load(model, device, passes.embedding)
    examples = load_examples(loaded, source, source.max_examples)
    align_loaded(loaded, examples, source, passes, kinds)
    write_dense(output, loaded)
    basis = basis_of(loaded.model.config)
    title = f"{words_for(kinds)} are in the basis '{basis}': {output}"
    print_result({"basis": basis, "folder": str(output)}, [], title, json_)
