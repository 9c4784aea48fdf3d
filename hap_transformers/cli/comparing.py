"""Compares a pruned model with the dense one: costs, outputs on held-out examples, metrics if there are labels."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import EvalPrediction, PreTrainedModel

from ..data.tokenizers import longest_text
from ..efficiency import compare_latency, evaluating, example_inputs
from ..forward_modes import device_name
from ..reporting.costs import add_trimmed, costs_of
from ..reporting.fidelity import measure_fidelity
from .examples import Examples
from .loading import LENGTH, Loaded


Models = Mapping[str, PreTrainedModel]


def compare(loaded: Loaded, dense: PreTrainedModel, examples: Examples | None, batch: int, length: int | None) -> dict:
    """Measures what a pruned model costs and how far its outputs moved.

    Args:
        loaded (`Loaded`): The pruned model.
        dense (`PreTrainedModel`): The dense model.
        examples (`Examples`, *optional*): What is compared on, if anything is held out.
        batch (`int`): Texts or images of the batch that is timed.
        length (`int`, *optional*): Tokens per text there; by default 128; at most all that the model takes.

    Returns:
        `dict`: The costs and the fields `task`, `metrics`, `intervals`, `fidelity`, `num_examples`, `batch` and
            `device` of `results.json`, each as far as it can be measured.
    """
    models = {"dense": dense, "pruned": loaded.model}
    found: dict[str, Any] = {"task": None, "metrics": {}, "intervals": {}, "fidelity": {}, "num_examples": {}}
    found["device"] = device_name(dense.device)
    try:
        inputs = example_inputs(dense, batch, min(length or LENGTH, longest_text(dense)))
    except ValueError:  # A model of other inputs.
        found |= costs_of(models)
    else:
        found |= costs_of(models, inputs, compare_latency(models, inputs, progress=True))
        found["batch"] = list(next(iter(inputs.values())).shape)
    if loaded.vocabulary is not None:
        found["vocabulary"] = loaded.vocabulary.summary()
        add_trimmed(found, loaded.vocabulary, dense)
    if examples is None:
        return found
    found["num_examples"] = {"train": len(examples.rows), "validation": len(examples.held_out)}
    if len(examples.held_out):
        found["fidelity"] = measure_fidelity(loaded.model, dense, examples.compared(), loaded.embed)
    if examples.task is not None and len(examples.held_out):
        found["task"] = examples.task.name
        found["metrics"], found["intervals"] = _metrics(models, examples)
    return found


def _metrics(models: Models, examples: Examples) -> tuple[dict[str, Any], dict[str, Any]]:
    """The task's metrics of either model on the held-out examples, and their intervals."""
    assert examples.task is not None  # Only tasks have labels.
    metrics, figures, intervals = examples.task.metrics(), {}, {}
    for phase, model in models.items():
        logits, labels = [], []
        with evaluating(model):
            for batch in examples.compared():
                labels.append(batch["labels"])
                logits.append(model(**send_to_device(dict(batch), model.device)).logits.float().cpu())
        figures[phase] = metrics(EvalPrediction(torch.cat(logits).numpy(), torch.cat(labels).numpy()))
        intervals[phase] = metrics.intervals()
    return figures, intervals
