"""`estimate_sensitivity`: the one entry to all scoring methods."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from transformers import PreTrainedModel
from transformers.utils import logging

from ..alignment.basis_name import basis_of
from ..components.architectures import get_architecture
from ..components.forwards import eager_model
from ..components.groups import KINDS, Group, by_kind, find_groups, validate_undivided
from ..components.sharded import is_sharded
from ..components.slicing import validate_cuttable, validate_in_memory, validate_plain_weights
from ..memory import memory_limit
from ..number_fields import validate_whole
from .by_parts import reliability, score_on_batches
from .methods import Finished, Method, get_method, methods_without
from .output_curvature import EXACT_DIRECTIONS
from .precision import Precision, chosen_precision
from .sensitivity import Sensitivity
from .state_file import Progress
from .task import LossFunction, ScoringTask, model_loss, validate_directions


logger = logging.get_logger(__name__)

# Below this split-half reliability more than half of the variance in ranks is noise.
RELIABLE = 0.5


def estimate_sensitivity(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    method: str = "kronecker",
    *,
    components: Sequence[str] | None = None,
    num_probes: int = 4,
    exact_directions: int = EXACT_DIRECTIONS,
    tolerance: float | None = None,
    max_examples: int | None = None,
    precision: str | None = None,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
    state_file: str | Path | None = None,
    max_memory: int | str | None = None,
) -> Sensitivity:
    """Measures how much each attention head, FFN neuron and other component matters to a model's loss.

    Dropout is off while scoring. The model comes back as it was: mode, `requires_grad`, `.grad` and hooks.

    Parameters that say what is scored:
        model (`PreTrainedModel`): A model of a supported architecture.
        batches (`Iterable[Mapping[str, Any]]`): Batches of model inputs with labels, as a `DataLoader` yields them.
        components (`Sequence[str]`, *optional*): Kinds to score, such as `["heads", "neurons"]`, or
            `["query_key_dims", "value_dims", "neurons"]` after [`align_heads`], or `["layers"]` for whole layers. By
            default whole heads and all other kinds of the model; dimensions of heads where the model has lost some.
        max_examples (`int`, *optional*): Stop after this many examples.
        loss_fn (`Callable`, *optional*): Takes the model and a batch, returns the batch's mean loss. By default the
            model's own loss. `"kronecker"`, `"gauss_newton_trace"` and `"fisher"` need a loss that is computed from
            the logits of one call of the model itself, convex in them, and a mean over examples that do not depend on
            each other.

    Parameters that say how:
        method (`str`, *optional*, defaults to `"kronecker"`): One of `hap_transformers.METHODS`:

            - `"kronecker"`: what removal costs after an optimal refit, by Kronecker-factored Gauss-Newton curvature
              of the output projections; of whole layers, how much they change what they read;
            - `"gauss_newton_trace"`: relative trace of the Gauss-Newton matrix, exact for few outputs; of whole
              layers, what it costs to run without them, measured in a forward pass for each;
            - `"hessian_trace"`: relative trace of the Hessian by Hutchinson's method, as in HAP;
            - `"gradient"`: mask gradients (Michel et al.), those of heads normalised within each layer;
            - `"fisher"`: half the diagonal of the Gauss-Newton matrix of masks, whose part over heads is kept;
            - `"magnitude"`: norm of the weights;
            - `"random"`;
            - any method added by [`register_method`].
        num_probes (`int`, *optional*, defaults to 4): Random probes per batch, for `"hessian_trace"`, and for
            `"kronecker"`, `"gauss_newton_trace"` and `"fisher"` where examples have more directions than the next.
        exact_directions (`int`, *optional*, defaults to 16): Directions of an example's outputs up to which these
            backpropagate all of them, one pass each. A classifier of C classes has C - 1. Above, `num_probes` random
            mixtures take a pass each, and add noise.
        tolerance (`float`, *optional*): Stop as soon as the split-half reliability of the scores reaches this, in
            (0, 1). `Sensitivity.converged` reports whether it did.
        precision (`str`, *optional*): `"bf16"` or `"fp16"` to run forward passes and products in low precision, as in
            [EHAP](https://arxiv.org/abs/2306.07030). By default that of `accelerator`, or else the model's own.
        seed (`int`, *optional*, defaults to 0): Seed of the probes. The global random state is neither read nor moved.

    Parameters that say where:
        accelerator (`Accelerator`, *optional*): Shares the batches out between its processes. Give every process the
            *same* batches (a loader that was not prepared); all get the same result, that of a single process. Where
            the model's weights are sharded (FSDP), all processes go through all batches together.
        state_file (`str` or `Path`, *optional*): File that keeps the progress. An interrupted call that is repeated
            goes on from there, with the result of an uninterrupted one. The file is deleted at the end.
        max_memory (`int` or `str`, *optional*): Bytes, such as `"4GB"`, that the sums of `"kronecker"` may take beside
            the model and its activations. Layers are scored in parts that fit, each in a pass over the batches of its
            own, with the same result. By default all are scored at once.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `Sensitivity`: Scores of the components that are left, by kind, one tensor per layer.

    Raises:
        ValueError: If the architecture, the method, a kind or the precision is unknown, a number is out of range,
            there are no examples or no labels, weights are offloaded, the method cannot score a kind or a sharded
            model, a loss is not finite or does not suit the method, or `state_file` is that of another call.
        torch.OutOfMemoryError: If the memory is short; the message says in what phase. The model is unchanged.
        FileNotFoundError: If the folder of `state_file` does not exist.

    Example:

    ```python
    sensitivity = estimate_sensitivity(model, loader, max_examples=512)
    sensitivity.scores["heads"][0]  # scores of the first layer's heads
    ```
    """
    validate_scoring(method, num_probes, tolerance, max_examples, max_memory, exact_directions)
    start, model = time.perf_counter(), eager_model(model)
    if accelerator is not None:
        model = accelerator.unwrap_model(model)
    precision = chosen_precision(precision, accelerator)
    _validate_call(model, batches, method, accelerator, state_file)
    groups = _groups_to_score(model, method, components)
    scoring = get_method(method).for_groups(groups)
    scored = [group for group in groups if group.num_components]
    precise = Precision(precision, model.device.type)
    task = ScoringTask(model, scored, loss_fn or model_loss, num_probes, precise, seed, exact_directions)
    if scoring.sample is None:
        result = _result(method, groups, Finished(scoring.finish(task, None).detach().cpu().double()))
    else:
        run = {"method": method, "components": sorted({group.kind.name for group in groups}), "num_probes": num_probes}
        run |= {"seed": seed, "precision": precision}
        if exact_directions != EXACT_DIRECTIONS:  # Earlier releases have no other.
            run["exact_directions"] = exact_directions
        found, done = score_on_batches(
            task,
            scoring,
            method,
            batches,
            tolerance=tolerance,
            max_examples=max_examples,
            max_memory=max_memory,
            accelerator=accelerator,
            state_file=state_file,
            run={**run, "max_examples": max_examples},
            progress=progress,
        )
        result = _result(method, groups, found, done)
        result.reliability = reliability(task, scoring, done.moments)
        _validate_curvature(task, scoring, result)
    result.model, result.model_type = model.config.name_or_path or "", model.config.model_type
    result.basis = basis_of(model.config, result.scores)
    result.seconds = time.perf_counter() - start
    if accelerator is None or accelerator.is_main_process:
        _report(result, tolerance)
    return result


def validate_scoring(
    method: str,
    num_probes: int,
    tolerance: float | None,
    max_examples: int | None,
    max_memory: int | str | None = None,
    exact_directions: int = EXACT_DIRECTIONS,
) -> None:
    """Checks the settings of scoring, without a model.

    Raises:
        ValueError: If the method is unknown or a number is out of range.
    """
    get_method(method)
    validate_directions(num_probes, exact_directions)
    if max_examples is not None:
        validate_whole("max_examples", max_examples, 1)
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` is a reliability and must be in (0, 1), got {tolerance}.")
    memory_limit(max_memory)


def _validate_curvature(task: ScoringTask, scoring: Method, result: Sensitivity) -> None:
    if scoring.curvature is None or any(scores.any() for layers in result.scores.values() for scores in layers):
        return
    raise ValueError(
        f"All scores are zero: {task.loss_name} has no curvature in the {scoring.curvature} on these examples. It is "
        "piecewise linear or saturated there, or does not depend on the components. Nothing can be ranked by "
        f"'{result.method}'. Use another loss (`loss_fn`), or one of {methods_without(scoring.curvature)}."
    )


def _validate_call(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    method: str,
    accelerator: Accelerator | None,
    state_file: str | Path | None,
) -> None:
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"`batches` is a {type(batches).__name__}; give dictionaries of model inputs, such as a list."
        )
    prepared = isinstance(batches, DataLoaderShard | DataLoaderDispatcher)
    if accelerator is not None and accelerator.num_processes > 1 and prepared:
        raise ValueError(
            "`batches` is a prepared loader, which gives every process batches of its own. Pass the loader as it "
            "was before accelerator.prepare: estimate_sensitivity shares the batches out itself."
        )
    if not get_method(method).scores_sharded and is_sharded(model):
        raise ValueError(
            f"'{method}' cannot score a model whose weights are sharded (FSDP). Every built-in method but "
            "'hessian_trace' can; or score before the model is wrapped."
        )
    if state_file is not None and not Path(state_file).parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{Path(state_file).parent}' for the state file; make it first.")


def _groups_to_score(model: PreTrainedModel, method: str, components: Sequence[str] | None) -> list[Group]:
    if isinstance(components, str) or components is not None and (not components or not set(components) <= set(KINDS)):
        raise ValueError(f"`components` must name some of {', '.join(KINDS)}, got {components!r}.")
    validate_undivided(model, components or ())
    groups = find_groups(model, components)
    validate_plain_weights(model, groups)
    validate_in_memory(groups)
    validate_cuttable(model, groups)
    found = [kind.name for kind in by_kind(groups)]
    if missing := set(components or ()) - set(found):
        raise ValueError(
            f"{type(model).__name__} has no {', '.join(sorted(missing))}; the kinds of its entry in "
            f"hap_transformers.ARCHITECTURES are {', '.join(get_architecture(model).names)}."
        )
    if len(found) > 1 and any(group.members for group in groups):
        raise ValueError(f"`components` are {', '.join(found)}, of which some are made of others. Score them apart.")
    if whole := [group for group in groups if group.whole is not None and not group.is_split]:
        what = str(whole[0].kind.basis).removeprefix("aligned_")
        raise ValueError(
            f"The {whole[0].kind.name} of this {type(model).__name__} are in no basis in which some can be left out. "
            f"Call align_{what} first."
        )
    scoring = get_method(method)
    unable = [kind.name for kind in by_kind(groups) if not scoring.can_score(kind.name)]
    if unable and components is not None:
        able = ", ".join(name for name in scoring.kinds or KINDS if scoring.can_score(name))
        raise ValueError(f"'{method}' cannot score {', '.join(unable)}; it scores {able}.")
    groups = [group for group in groups if group.kind.name not in unable]
    if not any(group.num_components for group in groups):
        kinds = " or ".join(kind.name for kind in by_kind(groups))
        raise ValueError(f"{type(model).__name__} has no {kinds} left to score.")
    return groups


def _result(method: str, groups: Sequence[Group], found: Finished, done: Progress | None = None) -> Sensitivity:
    """Splits scores, traces and standard errors by kind and layer.

    Args:
        method (`str`): The method.
        groups (`Sequence[Group]`): All groups that were asked for, also those with no components left.
        found (`Finished`): The scores.
        done (`Progress`, *optional*): The samples behind them.
    """
    facts = get_method(method).for_groups(groups)
    moments = done.moments if done is not None and facts.has_traces else None
    result = Sensitivity(
        method=method,
        scores=_split(groups, found.scores.cpu()),
        order=_split(groups, found.order),
        traces=_split(groups, None if moments is None else moments.mean),
        stderr=_split(groups, None if moments is None else moments.standard_error()),
        interactions=found.interactions,
        comparable=facts.comparable,
        foresees_refit=facts.foresees_refit,
        in_loss_units=facts.in_loss_units,
    )
    if done is not None:
        result.num_examples, result.num_probes = done.moments.num_examples, done.num_probes
        result.converged = done.converged
    return result


def _split(groups: Sequence[Group], values: torch.Tensor | None) -> dict[str, list[torch.Tensor]]:
    if values is None:
        return {}
    layers: dict[str, list[torch.Tensor]] = {}
    for group, part in zip(groups, values.split([group.num_components for group in groups]), strict=True):
        layers.setdefault(group.kind.name, []).append(part.clone())
    return layers


def _report(result: Sensitivity, tolerance: float | None) -> None:
    """Logs why scoring stopped, and warns where it leaves the ranking open."""
    if result.converged:
        logger.info(f"Stopped after {result.num_examples} examples: reliability {tolerance} is reached.")
    elif result.converged is False:
        logger.warning(f"All examples and probes were used before reliability {tolerance} was reached.")
    for kind, layers in result.scores.items():
        if equal := [i for i, scores in enumerate(layers) if len(scores) > 1 and (scores == scores[0]).all()]:
            where = "all layers" if len(equal) == len(layers) else f"layers {equal}"
            logger.warning(f"The scores of all {kind} are equal in {where}: '{result.method}' does not rank them.")
    if result.reliability is not None and result.reliability < RELIABLE:
        logger.warning(
            f"The ranking is not resolved: its reliability is {result.reliability:.2f}, where 1 is a ranking that "
            "another sample would repeat and 0 is noise. Raise max_examples or num_probes, or use "
            "method='gauss_newton_trace'."
        )
