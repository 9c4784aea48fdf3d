"""`hap prune`."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from ..alignment.basis_name import depends_on_basis
from ..components.groups import KINDS
from ..components.record import recorded_structure
from ..forward_modes import validate_mode
from ..planning.kinds import WHOLE_MODEL, kinds_to_prune
from ..planning.settings import PlanningSettings
from ..planning.uniform_layers import validate_uniform
from ..refit.tune_layers import epochs_to_tune
from ..reporting.costs import cost_rows
from ..reporting.wording import fidelity_rows, name_of_first, slowness, words_for
from ..sensitivity import Sensitivity, validate_scoring
from ..surgery.plan import PruningPlan
from ..training.config import HapConfig
from .comparing import compare
from .errors import warn
from .examples import Examples, load_examples
from .loading import Loaded, load
from .options import (
    HELP,
    Device,
    Json,
    Model,
    RefitExamples,
    Scoring,
    Source,
    TuningEpochs,
    print_result,
    require_own_folder,
    takes_settings,
)
from .road import Steps, align, make_plan, make_scores, nothing_to_remove, prune_and_refit
from .writing import write_dense, write_pruned


@takes_settings
def prune(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for the pruned model.", show_default=False)],
    plan: Annotated[
        Path | None, typer.Option(help="File written by `hap plan`, in place of --ratio.", show_default=False)
    ] = None,
    ratio: Annotated[float | None, typer.Option(help=HELP["ratio"], show_default=False)] = None,
    *,
    settings: PlanningSettings,
    source: Source,
    scoring: Scoring,
    refit_examples: RefitExamples = HapConfig.refit_examples,
    tuning_epochs: TuningEpochs = HapConfig.tuning_epochs,
    trim_vocabulary: Annotated[bool, typer.Option("--trim-vocabulary", help=HELP["trim_vocabulary"])] = False,
    cost_batch: Annotated[int, typer.Option(help="Texts or images per batch for FLOPs and latency.", min=1)] = 8,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    json_: Json = False,
) -> None:
    """Score, plan, physically remove and refit, or carry out a plan. Texts need no labels."""
    _validate_road(plan, ratio, settings, scoring, source, trim_vocabulary)
    require_own_folder(output, model, overwrite)
    given = None if plan is None else PruningPlan.load(plan)
    if ratio is not None:
        settings = replace(settings, ratio=ratio)
    loaded, steps, scores = load(model, device, scoring.embedding), Steps(), None
    epochs = epochs_to_tune(tuning_epochs, True, loaded.model)
    if given is None:
        validate_mode(settings.latency_mode, loaded.model.device)
        kinds = _kinds(loaded, settings, scoring)
        wanted = source.named or tuning_epochs or scoring.needs_examples or depends_on_basis(kinds)
        most = max(source.max_examples, refit_examples)
        examples = load_examples(loaded, source, most, hold_out=True, trim=trim_vocabulary) if wanted else None
        scores, chosen = _planned(loaded, examples, settings, source, scoring, cost_batch, steps)
    else:
        given.validate(loaded.model)
        chosen, examples = given, None
        if (source.named or tuning_epochs) and not _is_empty(given):
            examples = load_examples(loaded, source, refit_examples)
    if _is_empty(chosen) and loaded.vocabulary is None:
        if scores is not None:  # Its heads may have been aligned.
            loaded = load(model, device, scoring.embedding)
        why = "The plan removes nothing" if given else nothing_to_remove(settings)
        _copy_unchanged(loaded, chosen, output, why, json_)
        return
    refitted = None if _is_empty(chosen) else examples
    epochs = 0 if refitted is None else epochs
    with steps.step("prune", _doing(refitted is not None, epochs)):
        least, memory = source.max_examples, scoring.max_memory
        dense = prune_and_refit(loaded, chosen, refitted, refit_examples, least, memory, epochs, scoring.precision)
    done = {"max_examples": source.max_examples, "refit_examples": refit_examples, "tuning_epochs": epochs}
    planned = {"ratio": chosen.ratio, "budget": chosen.budget, "method": chosen.method}
    results = {
        **_compared(loaded, dense, examples, cost_batch, source.length, steps),
        "hap_config": {**asdict(settings), **asdict(scoring), **done, **planned, "trim_vocabulary": trim_vocabulary},
        "reliability": scores.reliability if scores is not None else None,
        "seed": source.seed,
        "seconds": steps.seconds,
    }
    write_pruned(output, loaded, chosen, scores, results)
    _print(results, chosen, _how(chosen, refitted is not None, epochs), output, json_)


def _kinds(loaded: Loaded, settings: PlanningSettings, scoring: Scoring) -> tuple[str, ...]:
    """The kinds of component that may go."""
    kinds = kinds_to_prune(scoring.components, scoring.method, settings, loaded.model)
    if settings.uniform:
        validate_uniform(loaded.model, kinds)
    return kinds


def _copy_unchanged(loaded: Loaded, plan: PruningPlan, output: Path, why: str, json_: bool) -> None:
    """Saves a model of which nothing is to be removed, and says so."""
    write_dense(output, loaded, plan)
    title = f"{why.rstrip('.')}; the model was copied unchanged: {output}"
    print_result({"removed": {}, "refitted": False, "folder": str(output)}, [], title, json_)


def _validate_road(
    plan: Path | None, ratio: float | None, settings: PlanningSettings, scoring: Scoring, source: Source, trim: bool
) -> None:
    """Checks that the options belong to one of the two roads, and what can be checked without a model.

    Raises:
        ValueError: If they do not, or a number is out of range.
    """
    if (plan is None) == (ratio is None):
        raise ValueError(
            "Pass either --ratio, to score, plan and prune at once, or --plan with a file of `hap plan`"
            f"{', not both' if plan else ''}."
        )
    if trim and plan is not None:
        raise ValueError("--trim-vocabulary belongs to --ratio: a plan is for the model with the vocabulary it had.")
    if trim and not source.named:
        raise ValueError("--trim-vocabulary keeps the tokens of texts: pass --texts, --task or --train-file.")
    validate_scoring(scoring.method, scoring.num_probes, scoring.tolerance, source.max_examples, scoring.max_memory)
    if ratio is not None:
        kinds_to_prune(scoring.components, scoring.method, replace(settings, ratio=ratio))
        return
    for given, default in ((settings, PlanningSettings()), (replace(scoring, max_memory=None), Scoring())):
        for name, value in asdict(given).items():
            if value != asdict(default)[name]:
                raise ValueError(f"--{name.replace('_', '-')} belongs to --ratio: with --plan, nothing is chosen.")


def _is_empty(plan: PruningPlan) -> bool:
    return not any(plan.count(kind) for kind in plan.removed)


def _planned(
    loaded: Loaded,
    examples: Examples | None,
    settings: PlanningSettings,
    source: Source,
    scoring: Scoring,
    batch: int,
    steps: Steps,
) -> tuple[Sensitivity, PruningPlan]:
    """Scores a model, and plans what to remove."""
    kinds = kinds_to_prune(scoring.components, scoring.method, settings, loaded.model)
    if depends_on_basis(kinds):
        assert examples is not None  # They were loaded for it.
        with steps.step("align", f"aligning {words_for(kind for kind in kinds if depends_on_basis([kind]))}"):
            align(loaded, examples, source, scoring, kinds)
    what = f"scoring {words_for(kinds)} by {scoring.method}"
    if examples is not None:
        what += f" on {min(source.max_examples, len(examples.rows)):,} examples"
    with steps.step("score", what):
        scores = make_scores(loaded, examples, source, scoring, kinds)
    with steps.step("plan", f"planning to remove {settings.ratio:.0%} of {settings.budget}"):
        return scores, make_plan(loaded.model, scores, settings, batch, source.length)


def _compared(
    loaded: Loaded, dense: PreTrainedModel, examples: Examples | None, batch: int, length: int | None, steps: Steps
) -> dict[str, Any]:
    held_out = 0 if examples is None else len(examples.held_out)
    what = f"comparing with the {'model before' if recorded_structure(dense.config) else 'dense model'}"
    what += f" on {held_out:,} held-out examples" if held_out else ""
    with steps.step("compare", what):
        return compare(loaded, dense, examples, batch, length)


def _doing(refitted: bool, epochs: int) -> str:
    """Says what is done to the model."""
    return "pruning" + " and refitting" * refitted + ", then tuning layers" * bool(epochs)


def _how(plan: PruningPlan, refitted: bool, epochs: int) -> str:
    """Says what was done to what is left."""
    if _is_empty(plan):
        return "nothing to refit"
    if not refitted:
        return "not refitted (no --task, --train-file or --texts)"
    return "refitted, layers tuned" if epochs else "refitted"


def _print(results: dict[str, Any], plan: PruningPlan, how: str, output: Path, as_json: bool) -> None:
    """Prints the pruned model beside the one that it was made from."""
    rows = [["", name_of_first(results), "pruned", "left"]]
    rows += [[label, dense, pruned, f"{share:.1%}"] for label, dense, pruned, share in cost_rows(results)]
    rows += [[label, dense, pruned, ""] for label, dense, pruned in fidelity_rows(results)]
    for name in results["metrics"].get("pruned", {}):
        rows.append([name, *(f"{results['metrics'][phase][name]:.4f}" for phase in ("dense", "pruned")), ""])
    parameters = results["parameters"]
    title = f"{parameters['pruned']:,} of {parameters['dense']:,} parameters left, {how}: {output}"
    if held_out := results["num_examples"].get("validation"):
        title += f"\noutputs were compared on {held_out:,} held-out examples"
    if vocabulary := results.get("vocabulary"):
        title += f"\n{vocabulary['kept']:,} tokens are left, of which the {vocabulary['texts']:,} texts use "
        title += f"{vocabulary['used']:,}"
    for kind, saved in plan.saved.items() if plan.budget == WHOLE_MODEL else ():
        title += f"\n{saved:,} parameters fewer by {plan.count(kind):,} {KINDS[kind].label}"
    if (warning := slowness(results)) and not _is_empty(plan):
        warn(warning)
    costs = ("parameters", "encoder_parameters", "parts", "flops", "latency_ms", "bytes", "vocabulary")
    names = (*costs, "fidelity", "metrics", "num_examples")
    figures = {name: results[name] for name in names if results.get(name)}
    figures |= {"saved": plan.saved, "pruned_before": results["pruned_before"]}
    figures["removed"] = {kind: plan.count(kind) for kind in plan.removed}
    print_result({**figures, "refitted": how.startswith("refitted"), "folder": str(output)}, rows, title, as_json)
