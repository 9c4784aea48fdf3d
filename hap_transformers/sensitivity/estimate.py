"""`estimate_sensitivity`: the one entry to all scoring methods."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import broadcast
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..components.groups import AttentionBlock, Block, attention_blocks, feed_forward_blocks
from ..components.sharded import is_sharded
from .accumulate import Progress, accumulate
from .fisher import fisher
from .gauss_newton import gauss_newton_trace
from .gradient import gradient
from .hutchinson import hessian_trace
from .kronecker import kronecker, num_sums, surgeon_costs
from .magnitude import magnitude
from .precision import Precision
from .random import random
from .scores import component_scores, make_sensitivity
from .sensitivity import Sensitivity
from .state_file import StateFile
from .statistics import SampleMoments
from .task import LossFunction, ScoringTask, model_loss


logger = logging.get_logger(__name__)

# Below this split-half reliability more than half of the variance in ranks is noise.
RELIABLE = 0.5

SAMPLED = {
    "kronecker": kronecker,
    "gauss_newton_trace": gauss_newton_trace,
    "hessian_trace": hessian_trace,
    "gradient": gradient,
    "fisher": fisher,
}
WITHOUT_DATA = {"magnitude": magnitude, "random": random}
METHODS = (*SAMPLED, *WITHOUT_DATA)
COMPONENTS: dict[str, Callable[[PreTrainedModel], Sequence[Block]]] = {
    "heads": attention_blocks,
    "neurons": feed_forward_blocks,
}


def estimate_sensitivity(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    method: str = "kronecker",
    *,
    components: Sequence[str] = ("heads", "neurons"),
    num_probes: int = 4,
    tolerance: float | None = None,
    max_examples: int | None = None,
    precision: str | None = None,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
    state_file: str | Path | None = None,
) -> Sensitivity:
    """Measures how much each attention head and each FFN neuron matters to a model's loss.

    Dropout is off while scoring. The model comes back as it was: mode, `requires_grad`, `.grad` and hooks.

    Parameters that say what is scored:
        model (`PreTrainedModel`): A model of a supported architecture.
        batches (`Iterable[Mapping[str, Any]]`): Batches of model inputs with labels, such as a `DataLoader` gives.
        components (`Sequence[str]`, *optional*, defaults to `("heads", "neurons")`): What to score.
        max_examples (`int`, *optional*): Stop after this many examples.
        loss_fn (`Callable`, *optional*): Takes the model and a batch, returns the batch's mean loss. By default the
            model's own loss. `"kronecker"`, `"gauss_newton_trace"` and `"fisher"` need a loss that is computed from
            the logits of one call of the model itself, convex in them, and a mean over examples that do not depend on
            each other.

    Parameters that say how:
        method (`str`, *optional*, defaults to `"kronecker"`):

            - `"kronecker"`: what removal costs after an optimal refit, by Kronecker-factored Gauss-Newton curvature
              of the output projections;
            - `"gauss_newton_trace"`: relative trace of the Gauss-Newton matrix, exact for few outputs;
            - `"hessian_trace"`: relative trace of the Hessian by Hutchinson's method, as in HAP;
            - `"gradient"`: mask gradients (Michel et al.), those of heads normalised within each layer;
            - `"fisher"`: half the diagonal of the Gauss-Newton matrix of masks, whose part over heads is kept;
            - `"magnitude"`: norm of the weights;
            - `"random"`.
        num_probes (`int`, *optional*, defaults to 4): Random probes a batch, for `"hessian_trace"`, and for
            `"kronecker"`, `"gauss_newton_trace"` and `"fisher"` where examples have many outputs.
        tolerance (`float`, *optional*): Stop as soon as the split-half reliability of the scores reaches this, in
            (0, 1). Whether it did is told by `Sensitivity.converged`.
        precision (`str`, *optional*): `"bf16"` or `"fp16"` to run forward passes and products in low precision, as in
            [EHAP](https://arxiv.org/abs/2306.07030). By default that of `accelerator`, or else the model's own.
        seed (`int`, *optional*, defaults to 0): Seed of the probes. The global random state is neither read nor moved.

    Parameters that say where:
        accelerator (`Accelerator`, *optional*): Shares the batches out between its processes. Give every process the
            *same* batches (a loader that was not prepared); all get the same result, that of a single process. Where
            the model's weights are sharded (FSDP), all processes go through all batches together.
        state_file (`str` or `Path`, *optional*): Where to keep what is done, so that an interrupted call can be
            repeated and goes on from there, with the result of an uninterrupted one. Deleted at the end.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `Sensitivity`: Scores of the heads and neurons that are left, one tensor a layer.

    Raises:
        ValueError: If the architecture, the method, a component or the precision is unknown, a number is out of range,
            there are no examples or no labels, the model is sharded
            and the method `"hessian_trace"`, a loss is not finite or does not suit the method, or `state_file` is
            that of another call.
        FileNotFoundError: If the folder of `state_file` does not exist.

    Example:

    ```python
    sensitivity = estimate_sensitivity(model, loader, max_examples=512)
    sensitivity.heads[0]  # scores of the first layer's heads
    ```
    """
    validate_scoring(method, num_probes, tolerance, max_examples)
    if isinstance(components, str) or not components or not set(components) <= set(COMPONENTS):
        raise ValueError(f"`components` must name some of {', '.join(COMPONENTS)}, got {components!r}.")
    start = time.perf_counter()
    if accelerator is not None:
        model = accelerator.unwrap_model(model)
        precision = precision or accelerator.mixed_precision
        if accelerator.num_processes > 1 and isinstance(batches, (DataLoaderShard, DataLoaderDispatcher)):
            raise ValueError(
                "`batches` is a prepared loader, which gives every process batches of its own. Pass the loader as it "
                "was before accelerator.prepare: estimate_sensitivity shares the batches out itself."
            )
    if method == "hessian_trace" and is_sharded(model):
        raise ValueError(
            "'hessian_trace' cannot score a model whose weights are sharded (FSDP); every other method can, or score "
            "before the model is wrapped."
        )
    precision = None if precision == "no" else precision
    blocks = [block for name in COMPONENTS if name in components for block in COMPONENTS[name](model)]
    task = ScoringTask(
        model=model,
        blocks=[block for block in blocks if block.num_components],
        loss_fn=loss_fn or model_loss,
        num_probes=num_probes,
        precision=Precision(precision, model.device.type),
        seed=seed,
    )
    if not task.blocks:
        raise ValueError(f"{type(model).__name__} has no {' or '.join(components)} left to score.")
    squared_norms = task.squared_norms().cpu().double()
    # Processes that have a part of the weights each can only run the model together: every one on all batches.
    sharing = None if is_sharded(model) else accelerator

    def scores(means: torch.Tensor) -> torch.Tensor:
        return component_scores(method, task.blocks, squared_norms, means)

    if method in WITHOUT_DATA:
        result = make_sensitivity(method, blocks, scores(WITHOUT_DATA[method](task).cpu().double()))
        result.model = model.config.name_or_path or ""
        result.seconds = time.perf_counter() - start
        return result

    num_heads = sum(block.num_components for block in blocks if isinstance(block, AttentionBlock))
    sums = {"fisher": num_heads**2, "kronecker": num_sums(task.blocks)}.get(method, 0)

    def reliability(moments: SampleMoments) -> float | None:
        return moments.reliability(lambda means: scores(means)[: num_heads or None])

    fresh = Progress(SampleMoments.zeros(len(squared_norms), sums))
    main_process = accelerator is None or accelerator.is_main_process
    run = {"method": method, "components": sorted(components), "num_probes": num_probes, "seed": seed}
    run |= {"max_examples": max_examples, "precision": precision, "weights": f"{squared_norms.sum():.6e}"}
    if state_file is not None and not Path(state_file).parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{Path(state_file).parent}' for the state file; make it first.")
    state = None if state_file is None else StateFile(Path(state_file), run, accelerator)
    bar = tqdm(batches, desc=f"Scoring ({method})", disable=None if progress and main_process else True, leave=False)
    with _scoring_mode(model), bar:
        done = accumulate(
            SAMPLED[method],
            task,
            bar,
            fresh if state is None else state.load(fresh),
            per_example=method != "hessian_trace",
            max_examples=max_examples,
            accelerator=sharing,
            reliable=None if tolerance is None else lambda moments: (reliability(moments) or 0.0) >= tolerance,
            save=None if state is None else state.save,
        )
    if method == "kronecker":
        costs, order = surgeon_costs(task.blocks, done.moments.sums, done.moments.num_examples, progress)
        if accelerator is not None and accelerator.num_processes > 1:  # Another machine may round another way.
            costs, order = broadcast([costs.to(accelerator.device), order.to(accelerator.device)])
        result = make_sensitivity(method, blocks, costs.cpu(), order=order.cpu())
    else:
        result = make_sensitivity(method, blocks, scores(done.moments.mean), done.moments)
    if state is not None:
        state.delete()
    result.num_examples, result.num_probes = done.moments.num_examples, done.num_probes
    result.converged, result.reliability = done.converged, reliability(done.moments)
    result.model = model.config.name_or_path or ""
    result.seconds = time.perf_counter() - start
    if main_process:
        _tell(result, tolerance)
    return result


def validate_scoring(method: str, num_probes: int, tolerance: float | None, max_examples: int | None) -> None:
    """Checks what scoring can be asked for, without a model.

    Raises:
        ValueError: If the method is unknown or a number is out of range.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown sensitivity method '{method}'; choose one of {', '.join(METHODS)}.")
    for name, value in (("num_probes", num_probes), ("max_examples", max_examples)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` is a reliability and must be in (0, 1), got {tolerance}.")


def _tell(result: Sensitivity, tolerance: float | None) -> None:
    """Says why scoring stopped, and warns where it leaves the ranking open."""
    if result.converged:
        logger.info(f"Stopped after {result.num_examples} examples: reliability {tolerance} is reached.")
    elif result.converged is False:
        logger.warning(f"Examples and probes are spent before reliability {tolerance} was reached.")
    if result.reliability is not None and result.reliability < RELIABLE:
        logger.warning(
            f"The ranking is not resolved: its reliability is {result.reliability:.2f}, where 1 is a ranking that "
            "another sample would repeat and 0 is noise. Raise max_examples or num_probes, or use "
            "method='gauss_newton_trace'."
        )


@contextmanager
def _scoring_mode(model: PreTrainedModel) -> Iterator[None]:
    """Turns dropout off and freezes all weights; puts everything back afterwards."""
    training = [module for module in model.modules() if module.training]
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    # The forward that accelerate puts in place copies logits and loss to float32 apart from each other, so that the
    # one no longer leads to the other; `precision` does its work here.
    forward = model.__dict__.pop("forward", None) if "_original_forward" in model.__dict__ else None
    model.eval()
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, value in required.items():
            parameter.requires_grad_(value)
        if forward is not None:
            model.forward = forward
