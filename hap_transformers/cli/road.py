"""The road from a loaded model to a smaller one, in the steps that the commands share."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from transformers import PreTrainedModel

from ..alignment.align_kinds import align_kinds
from ..alignment.basis_name import ALIGNED_ON
from ..efficiency import example_inputs
from ..memory import named_out_of_memory
from ..planning.latency_table import LatencyTable
from ..planning.plan_pruning import plan_pruning
from ..planning.settings import PlanningSettings
from ..refit.dense_copy import sharing_copy
from ..refit.reconstruct import reconstruct
from ..refit.tune_layers import tune_layers
from ..sensitivity import Sensitivity, estimate_sensitivity
from ..surgery.apply_plan import apply_plan
from ..surgery.plan import PruningPlan
from .examples import Examples
from .loading import Loaded, chosen_length
from .options import Passes, Scoring, Source


SMALLER_REFIT = "Pass a smaller --batch or --max-memory, or fewer --refit-examples."


def make_scores(
    loaded: Loaded,
    examples: Examples | None,
    source: Source,
    scoring: Scoring,
    kinds: Sequence[str],
    state_file: Path | None = None,
) -> Sensitivity:
    """Scores components of some kinds of a model, on examples if the method needs any."""
    found = estimate_sensitivity(
        loaded.model,
        () if examples is None else examples.scored(source.max_examples),
        scoring.method,
        components=kinds,
        num_probes=scoring.num_probes,
        exact_directions=scoring.exact_directions,
        tolerance=scoring.tolerance,
        max_memory=scoring.max_memory,
        precision=scoring.precision,
        seed=source.seed,
        loss_fn=loaded.loss_fn,
        state_file=state_file,
    )
    found.model = loaded.name  # That of the encoder, which knows how the transformer is loaded.
    return found


def align(loaded: Loaded, examples: Examples, source: Source, passes: Passes, kinds: Sequence[str]) -> None:
    """Changes the bases of a model's dimensions, in place, so that these can be left out."""
    align_kinds(
        loaded.model,
        kinds,
        lambda: examples.scored(source.max_examples),
        max_examples=min(source.max_examples, ALIGNED_ON),
        num_probes=passes.num_probes,
        exact_directions=passes.exact_directions,
        precision=passes.precision,
        seed=source.seed,
        loss_fn=loaded.loss_fn,
    )


def make_plan(
    model: PreTrainedModel,
    scores: Sensitivity,
    settings: PlanningSettings,
    batch: int,
    length: int | None,
    precision: str | None = None,
) -> PruningPlan:
    """Chooses what to remove. Measures latencies or counts FLOPs of a batch of texts if the budget is of these."""
    inputs = table = None
    if settings.budget in ("flops", "latency"):
        inputs = example_inputs(model, batch, chosen_length(length, model))
    if settings.budget == "latency" and inputs is not None:
        table = LatencyTable.measure(model, inputs, mode=settings.latency_mode, precision=precision)
    return plan_pruning(scores, model, settings, inputs=inputs, latency_table=table)


def nothing_to_remove(settings: PlanningSettings) -> str:
    """Says that a plan is empty, and why."""
    return (
        f"Nothing to remove: the model meets {settings.budget} {settings.ratio:.0%} already. "
        "Ratios are shares of the dense model."
    )


def prune_and_refit(
    loaded: Loaded,
    plan: PruningPlan,
    examples: Examples | None,
    most: int,
    least: int,
    max_memory: str | None,
    tuning_epochs: int,
    precision: str | None = None,
) -> PreTrainedModel:
    """Removes what a plan names from a model, and refits and tunes what is left if there are examples.

    Args:
        loaded (`Loaded`): The model; changed in place.
        plan (`PruningPlan`): The plan.
        examples (`Examples`, *optional*): What to refit on.
        most, least (`int`): As for [`refit_batches`].
        max_memory, precision (`str`, *optional*): As for [`reconstruct`].
        tuning_epochs (`int`): As for [`tune_layers`]; 0 leaves that out.

    Returns:
        `PreTrainedModel`: The dense model, which shares parameters with the pruned one.
    """
    dense = sharing_copy(loaded.model)
    apply_plan(loaded.model, plan)
    if examples is not None:
        with named_out_of_memory("the model was refitted", SMALLER_REFIT):
            batches = examples.refitted(loaded, most, least)
            common: dict[str, Any] = {"max_memory": max_memory, "precision": precision}
            reconstruct(loaded.model, dense, batches, init_implants=tuple(plan.implants), **common)
            if tuning_epochs:
                batches = examples.refitted(loaded, most, least)
                tune_layers(loaded.model, dense, batches, epochs=tuning_epochs, **common)
    return dense


@dataclass
class Steps:
    """Names the steps of a command on the standard error, and keeps their seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Prints a step's title, and keeps its seconds under a name."""
        typer.echo(f"hap: {title}", err=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)
