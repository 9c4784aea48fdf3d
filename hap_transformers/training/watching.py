"""Watches a recovery: measures it on examples that it does not see, and undoes it where it does not help."""

import math
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils import logging

from ..data.calibration import drawn_alike
from ..data.metrics import metrics_at
from ..efficiency import evaluating
from ..sensitivity.batches import counts, shifts_labels
from .best_state import BestState
from .config import HapConfig
from .held_out import MOST, split


logger = logging.get_logger(__name__)

# Share of a recovery's passes that measuring may take, and how often it is measured at least and at most.
COST, FEWEST, MOST_CHECKS = 0.03, 2, 20
# In forward passes, a training step (forward, backward, dense model), and measuring (both models).
TRAINING_PASSES, MEASURING_PASSES = 4, 2
SHARDED = (
    "The recovery is not watched: weights that are shared out to processes cannot be kept. Compare the metrics before "
    "and after train()."
)
UNDONE = (
    "The recovery did not help and is undone: by {goal}, no weights of the {model} were better than those from before "
    "train(), which are back in place. Train longer or with another recovery_learning_rate, or leave the recovery out."
)
LABELS_LIKED_IT = (
    " The loss of the labels there had fallen from {before:.3g} to {after:.3g}. If that is what counts, as where the "
    "dense model was not fine-tuned before prune(), set distillation=0 or load_best_model_at_end=True."
)
UNJUDGED = (
    "The recovery is not judged, and its last weights are kept: {goal} is never a finite number. Compare the metrics "
    "before and after train()."
)


@contextmanager
def watched(trainer: Any, config: HapConfig | None, compute_loss: Callable[..., Any]) -> Iterator[None]:
    """Watches the training inside the context, and puts the best weights back at its end.

    Where the training arguments ask for the best model (`load_best_model_at_end`), their metric decides, and the
    weights from before the training are put back if those of no checkpoint are better. Otherwise the distance to the
    dense model does, or the loss of the labels where there is no dense model.

    Args:
        trainer (`HapTrainerMixin`): The trainer.
        config (`HapConfig`, *optional*): Its configuration. Without it nothing is watched.
        compute_loss (`Callable`): That of the class that the mixin extends.
    """
    if config is None or config.recovery_check == "none":
        yield
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        logger.warning(SHARDED)
        yield
        return
    whole, best, folder = trainer.train_dataset, trainer.args.load_best_model_at_end, Path(trainer.args.output_dir)
    rest, held_out = (whole, None) if best else split(trainer, config)
    goal = trainer.args.metric_for_best_model if best else f"{_measure(trainer)[1]} on {_where(config, held_out)}"
    if best:
        kept = BestState(partial(_badness, trainer), lambda steps: 0, folder, goal)
    else:
        examples = trainer.eval_dataset if config.recovery_check == "eval" else held_out
        batches = cache(partial(_batches, trainer, examples))
        kept = BestState(
            partial(_distance, trainer, compute_loss, batches),
            partial(_checks, trainer, examples),
            folder,
            goal,
            partial(_label_loss, trainer, compute_loss, batches) if _has_both(trainer, config) else None,
        )
    trainer.callback_handler.callbacks.insert(0, kept)  # Others shall find the best weights when training ends.
    trainer.train_dataset = rest
    earlier = trainer.results["metrics"].pop("recovered", None)
    try:
        yield
    finally:
        trainer.train_dataset = whole
        trainer.remove_callback(kept)
    if kept.of_earlier_attempt:
        trainer.results["metrics"].pop("recovered", None)  # No metrics are known to be of these weights.
    else:
        _keep_metrics(trainer, earlier, kept.step and (trainer.state.best_global_step if best else kept.step))
    _report(trainer, kept, goal)


def _measure(trainer: Any) -> tuple[str, str]:
    """What a recovery is judged by unless it is a metric: its name in logs, and in words."""
    if trainer.hooks.has_dense:
        return "hap_distance", "the distance to the dense model"
    return "hap_label_loss", "the loss of the labels"


def _has_both(trainer: Any, config: HapConfig) -> bool:
    """Whether the distance to the dense model and the labels both have a share of the loss."""
    return trainer.hooks.has_dense and config.distillation < 1


def _where(config: HapConfig, held_out: Any) -> str:
    """The examples to watch on, in words."""
    if config.recovery_check == "eval":
        return "the evaluation set"
    return "training examples" if held_out is None else "examples that were held out"


def _badness(trainer: Any, state: TrainerState) -> float:
    """The metric of the best model so far, or of the model before the training; the lower the better."""
    name, value = trainer.args.metric_for_best_model, state.best_metric
    if value is None:
        phase, trainer._phase = trainer._phase, "pruned"  # Of which model these are the metrics.
        try:
            metrics = trainer.evaluate()
        finally:
            trainer._phase = phase
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        if value is None:
            raise KeyError(
                f"metric_for_best_model='{name}' is not among the metrics of the evaluation: {', '.join(metrics)}. "
                "Set it to one of these."
            )
    return -value if trainer.args.greater_is_better else value


def _batches(trainer: Any, examples: Any) -> list[Any]:
    """This process's batches of the examples to watch on, or of training examples where there are none.

    All weights are measured on these: a collator that masks tokens at random, say, must not draw anew for each.
    """
    loader = trainer._scoring_loader(MOST) if examples is None else trainer.hooks.loader(examples, MOST)
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    batches, seen = list[Any](), 0
    for place, batch in enumerate(drawn_alike(loader, trainer.args.seed)):  # Also in a run that is resumed.
        if place % world == rank:
            batches.append(batch)
        seen += find_batch_size(batch) or trainer._train_batch_size
        if seen >= MOST:  # A stream, or a loader of the trainer's own, may have more.
            break
    return batches


def _distance(trainer: Any, compute_loss: Callable[..., Any], batches: Callable[[], list[Any]], *_: Any) -> float:
    """The mean distance to the dense model over the batches, or the loss of the labels where there is none."""
    if trainer.hooks.has_dense:
        distance = partial(trainer.hooks.distance_to_dense, compute_loss, trainer.model)
        found = max(_mean(trainer, batches, distance), 0.0)  # A divergence of zero may be rounded to less.
    else:
        found = _label_loss(trainer, compute_loss, batches)
    trainer.log({_measure(trainer)[0]: found})
    return found


def _label_loss(trainer: Any, compute_loss: Callable[..., Any], batches: Callable[[], list[Any]]) -> float:
    """The mean loss of the labels over the batches that have any."""
    shifted, hooks = shifts_labels(trainer._unwrapped_model()), trainer.hooks

    def loss(inputs: Any) -> torch.Tensor | None:
        if not counts(inputs, shifted) or (hooks.has_dense and hooks.lacks_labels(compute_loss, inputs)):
            return None
        return hooks.label_loss(compute_loss, trainer.model, inputs)

    return _mean(trainer, batches, loss)


def _mean(trainer: Any, batches: Callable[[], list[Any]], value: Callable[[Any], torch.Tensor | None]) -> float:
    """The mean of a batch's value over the batches that have one, which processes share; NaN if none has."""
    total = torch.zeros(2, dtype=torch.float64)
    # Loaders draw a seed, which the order of training batches must not depend on.
    with evaluating(trainer.model), torch.random.fork_rng(devices=[]), trainer.compute_loss_context_manager():
        for batch in batches():
            found = value(trainer._prepare_inputs(batch))
            if found is not None:
                total += torch.tensor([found.item(), 1.0], dtype=torch.float64)
    found, count = trainer.accelerator.reduce(total.float().to(trainer.args.device), "sum").tolist()
    return found / count if count else math.nan


def _checks(trainer: Any, examples: Any, steps: int) -> int:
    """How often to measure within so many steps: so often that it takes a small share of their time."""
    args = trainer.args
    trained = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    measured = min(len(examples), MOST) if isinstance(examples, Sized) else MOST
    wanted = COST * TRAINING_PASSES * trained / (MEASURING_PASSES * measured)
    return min(max(FEWEST, math.floor(wanted)), MOST_CHECKS)


def _keep_metrics(trainer: Any, earlier: dict[str, float] | None, step: int | None) -> None:
    """Of metrics from within the training, keeps those of the weights that it ended with.

    Args:
        trainer (`HapTrainerMixin`): The trainer.
        earlier (`dict[str, float]`, *optional*): Metrics of a recovery before this one.
        step (`int`, *optional*): The step of the weights. At 0 these are the weights from before the training.
    """
    metrics = trainer.results["metrics"]
    if metrics.pop("recovered", earlier) is None:
        return
    found = metrics_at(trainer.state, step) if step else earlier or metrics.get("pruned")
    if found:
        metrics["recovered"] = dict(found)


def _report(trainer: Any, kept: BestState, goal: str) -> None:
    """Notes for the card what recovery brought, and tells if it was undone."""
    trainer.results.pop("recovery", None)
    if not math.isfinite(kept.best):
        logger.warning(UNJUDGED.format(goal=goal))
        return
    before = kept.before if math.isfinite(kept.before) else None  # JSON has no other numbers.
    step = None if kept.of_earlier_attempt else kept.step
    trainer.results["recovery"] = {"before": before, "after": kept.best, "step": step}
    if step == 0:
        words = UNDONE.format(model=type(trainer._unwrapped_model()).__name__, goal=goal)
        labels = dict(zip(("before", "after"), kept.aside_values or (math.nan, math.nan), strict=True))
        visible = f"{labels['after']:.3g}" != f"{labels['before']:.3g}"
        fell = visible and labels["after"] < labels["before"]
        logger.warning(words + (LABELS_LIKED_IT.format(**labels) if fell else ""))
