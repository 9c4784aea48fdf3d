"""`hap score`."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..alignment.basis_name import basis_of, depends_on_basis
from ..components.groups import by_kind, find_groups
from ..planning.kinds import WHOLE_MODEL, kinds_to_prune
from ..planning.settings import PlanningSettings
from ..sensitivity import Sensitivity
from ..sensitivity.state_file import validate_state_file
from .examples import load_examples
from .loading import load
from .options import (
    Device,
    Json,
    Model,
    Scoring,
    Source,
    print_result,
    require_writable,
    table_by_layer,
    takes_settings,
)
from .road import make_scores


@takes_settings
def score(
    model: Model,
    *,
    source: Source,
    scoring: Scoring,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="File for the scores.")] = Path("sensitivity.safetensors"),
    state_file: Annotated[Path | None, typer.Option(help="File to resume from after an interruption.")] = None,
    json_: Json = False,
) -> None:
    """Score every component of a model, on a task's examples or on texts without labels."""
    require_writable(output, Sensitivity.load, [source.train_file, state_file, *(source.texts or ())])
    if state_file is not None and state_file.absolute() == output.absolute():
        raise ValueError(f"--state-file and --output are both '{output}'; choose two files.")
    if state_file is not None:
        require_writable(state_file, validate_state_file, [source.train_file], "--state-file")
    # What is scored by name may go under any budget.
    settings = PlanningSettings(budget=WHOLE_MODEL) if scoring.components else PlanningSettings()
    kinds_to_prune(scoring.components, scoring.method, settings)
    loaded = load(model, device, scoring.embedding)
    examples = load_examples(loaded, source, source.max_examples) if scoring.needs_examples else None
    aligned = bool(basis_of(loaded.model.config))
    kinds = kinds_to_prune(scoring.components, scoring.method, settings, loaded.model, aligned=aligned)
    if depends_on_basis(kinds) and not aligned:
        typer.echo(
            f"hap: The heads of '{model}' were not aligned: the costs of their dimensions are those of an arbitrary "
            "basis, and too high. Run `hap align` first, and score the model that it writes.",
            err=True,
        )
    found = make_scores(loaded, examples, source, scoring, kinds, state_file)
    found.save(output)
    columns = {
        f"{kind.name}: lowest to highest score": {
            group.layer: _span(scores) for group, scores in zip(groups, found.scores[kind.name], strict=True)
        }
        for kind, groups in by_kind(find_groups(loaded.model, found.scores)).items()
    }
    reliability = "" if found.reliability is None else f", reliability {found.reliability:.2f}"
    title = f"{found.method} on {found.num_examples} examples{reliability}, on {loaded.model.device.type}: {output}"
    figures = {"method": found.method, "examples": found.num_examples, "reliability": found.reliability}
    print_result({**figures, "file": str(output)}, table_by_layer(columns), title, json_)


def _span(scores: torch.Tensor) -> str:
    return f"{scores.min():.2e} to {scores.max():.2e}" if len(scores) else ""
