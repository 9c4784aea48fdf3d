"""Scores that are computed layer by layer, for less memory, are those of a single pass."""

import dataclasses
import itertools

import pytest
import torch
from tiny import make_batch, make_model
from zoo import ZOO

from hap_transformers import METHODS, estimate_sensitivity
from hap_transformers.memory import memory_limit
from hap_transformers.sensitivity import by_parts, surgeon
from hap_transformers.sensitivity.batches import ScoredBatch
from hap_transformers.sensitivity.kronecker import kronecker


BATCHES = [make_batch(size=3 + seed % 2, seed=seed) for seed in range(4)]


@pytest.fixture
def parts(monkeypatch):
    """Numbers of the layers that were scored together, pass after pass."""
    seen = []
    accumulated = by_parts.accumulated

    def noted(task, *args):
        seen.append(sorted({group.layer for group in task.groups}))
        return accumulated(task, *args)

    monkeypatch.setattr(by_parts, "accumulated", noted)
    return seen


def assert_same(found, expected):
    for name in ("scores", "order", "traces", "stderr"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=0)
    assert (found.reliability, found.num_examples) == (expected.reliability, expected.num_examples)
    assert found.num_probes == expected.num_probes


@pytest.mark.parametrize("model_type", ["bert", "deberta-v3", "llama", "albert"])
def test_scores_of_one_layer_at_a_time(model_type, parts):
    """Random probes, where there are any, are those of a single pass."""
    tiny = ZOO[model_type]
    model, batches = tiny.model(), [tiny.batch(3), tiny.batch(2)]
    for batch in batches:
        batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    whole = estimate_sensitivity(model, batches, progress=False)
    layered = estimate_sensitivity(model, batches, progress=False, max_memory=1)
    assert parts == [sorted({i for part in parts[1:] for i in part}), *parts[1:]] and len(parts) > 2
    assert_same(layered, whole)


def test_layers_share_a_pass_as_far_as_the_memory_goes(parts):
    """A layer's sums and the matrices of an elimination: so many bytes, and no more."""
    model = make_model(num_hidden_layers=4)
    neurons, hidden = model.config.intermediate_size, model.config.hidden_size
    sums = 8 * sum(1 + inputs + inputs**2 + hidden**2 for inputs in (hidden, neurons))
    matrices = surgeon.elimination_bytes(max(hidden, neurons))
    whole = estimate_sensitivity(model, BATCHES, progress=False)
    for memory, expected in (
        (2 * sums + matrices, [[0, 1], [2, 3]]),
        (2 * sums + matrices - 1, [[0], [1], [2], [3]]),
        (4 * sums + matrices, [[0, 1, 2, 3]]),
    ):
        parts.clear()
        assert_same(estimate_sensitivity(model, BATCHES, progress=False, max_memory=memory), whole)
        assert parts == expected


def test_methods_without_large_sums_need_one_pass(parts):
    whole = estimate_sensitivity(make_model(), BATCHES, "gauss_newton_trace", progress=False)
    found = estimate_sensitivity(make_model(), BATCHES, "gauss_newton_trace", progress=False, max_memory=1)
    assert_same(found, whole)
    assert parts == [[0, 1], [0, 1]]


def test_batches_that_can_be_read_once():
    whole = estimate_sensitivity(make_model(), BATCHES, progress=False, max_examples=9)
    endless = itertools.cycle(BATCHES)
    assert_same(estimate_sensitivity(make_model(), endless, progress=False, max_examples=9, max_memory=1), whole)


def test_all_layers_are_scored_on_the_examples_that_were_enough():
    settings = {"tolerance": 0.01, "progress": False}
    whole = estimate_sensitivity(make_model(), BATCHES, **settings)
    found = estimate_sensitivity(make_model(), BATCHES, max_memory=1, **settings)
    assert found.num_examples == whole.num_examples < sum(len(batch["labels"]) for batch in BATCHES)
    assert found.converged
    torch.testing.assert_close(found.scores, whole.scores, rtol=1e-12, atol=0)


@pytest.mark.parametrize("after", [2, 6])
def test_goes_on_in_the_part_where_it_was_interrupted(after, tmp_path, monkeypatch):
    model, scored = make_model(), []
    whole = estimate_sensitivity(model, BATCHES, progress=False)
    settings = {"max_memory": 1, "state_file": tmp_path / "state", "progress": False}

    def counted(task, batch: ScoredBatch):
        if len(scored) == after:
            raise KeyboardInterrupt
        scored.append((task.groups[0].layer, batch.number))
        return kronecker(task, batch)

    with monkeypatch.context() as interrupted:
        interrupted.setitem(METHODS, "kronecker", dataclasses.replace(METHODS["kronecker"], sample=counted))
        with pytest.raises(KeyboardInterrupt):
            estimate_sensitivity(model, BATCHES, **settings)
        after = -1
        assert_same(estimate_sensitivity(model, BATCHES, **settings), whole)
    assert scored == [(layer, number) for layer in range(2) for number in range(4)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("max_memory", [None, 1])
def test_a_run_that_had_converged_scores_no_more_batches(max_memory, tmp_path, monkeypatch):
    """It was interrupted while costs were computed."""
    settings = {"tolerance": 0.01, "max_memory": max_memory, "progress": False}
    whole = estimate_sensitivity(make_model(), BATCHES, **settings)

    def interruption(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setitem(METHODS, "kronecker", dataclasses.replace(METHODS["kronecker"], settle=interruption))
        with pytest.raises(KeyboardInterrupt):
            estimate_sensitivity(make_model(), BATCHES, state_file=tmp_path / "state", **settings)
    resumed = estimate_sensitivity(make_model(), BATCHES, state_file=tmp_path / "state", **settings)
    assert_same(resumed, whole)
    assert resumed.converged


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
@pytest.mark.parametrize("phase", ["batches", "costs"])
def test_out_of_memory_is_named(error, phase, tmp_path, monkeypatch):
    """The model is as it was, and the state file good."""
    model, state = make_model(), tmp_path / "state"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = estimate_sensitivity(model, BATCHES, progress=False)

    def fails(*args):
        raise error

    def fails_later(task, batch: ScoredBatch):
        return fails() if batch.number == 2 else kronecker(task, batch)

    change = {"sample": fails_later} if phase == "batches" else {"settle": fails}
    with monkeypatch.context() as short:
        short.setitem(METHODS, "kronecker", dataclasses.replace(METHODS["kronecker"], **change))
        done = "layers 0 to 1 were scored on batches" if phase == "batches" else "costs of removal were computed"
        with pytest.raises(torch.OutOfMemoryError, match=rf"while {done}.*max_memory='4GB'.*'{state}'") as caught:
            estimate_sensitivity(model, BATCHES, state_file=state, progress=False)
    assert caught.value.__cause__ is error
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same(estimate_sensitivity(model, BATCHES, state_file=state, progress=False), whole)


def test_out_of_memory_in_the_models_own_loss_is_named():
    """Such an error is no sign of a wrong batch."""

    def loss_fn(model, batch):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(torch.OutOfMemoryError, match="while layers 0 to 1 were scored"):
        estimate_sensitivity(make_model(), BATCHES, loss_fn=loss_fn, progress=False)


@pytest.mark.parametrize("given", ["8 apples", "-4GB", 0, -1, "", 1.5])
def test_what_is_no_memory_is_refused(given):
    with pytest.raises(ValueError, match="`max_memory` is a number of bytes or a text"):
        estimate_sensitivity(make_model(), BATCHES, max_memory=given)


def test_memory_in_words():
    assert (memory_limit("2GiB"), memory_limit("3MB"), memory_limit(5)) == (2**31, 3_000_000, 5)
