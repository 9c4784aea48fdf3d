"""An interrupted run resumes to the result of an uninterrupted one."""

import dataclasses

import pytest
import torch
from tiny import make_batch, make_model

from hap_transformers import METHODS, estimate_sensitivity


BATCHES = [make_batch(size=3 + seed % 2, seed=seed) for seed in range(5)]


def interrupted(after):
    """Batches, and an interruption after some of them."""
    yield from BATCHES[:after]
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["gauss_newton_trace", "hessian_trace", "gradient", "fisher"])
@pytest.mark.parametrize("settings", [{}, {"tolerance": 0.9999, "components": ["neurons"]}], ids=str)
def test_resumed_equals_uninterrupted(tmp_path, method, settings):
    state, settings = tmp_path / "state", {"num_probes": 3, "progress": False, **settings}
    expected = estimate_sensitivity(make_model(), BATCHES, method, **settings)
    for after in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            estimate_sensitivity(make_model(), interrupted(after), method, state_file=state, **settings)
        assert state.exists()
    calls = []

    def loss_fn(model, batch):
        calls.append(len(batch["labels"]))
        return model(**batch).loss

    result = estimate_sensitivity(make_model(), BATCHES, method, state_file=state, loss_fn=loss_fn, **settings)
    assert calls == [len(batch["labels"]) for batch in BATCHES[3:]]  # Finished batches are not scored again.
    for name in ("scores", "traces", "stderr", "interactions"):
        values = (getattr(result, name), getattr(expected, name))
        torch.testing.assert_close(*values, rtol=0, atol=0)
    assert (result.reliability, result.num_examples) == (expected.reliability, expected.num_examples)
    assert (result.num_probes, result.converged) == (expected.num_probes, expected.converged)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "another run: it differs in seed"),
        ({"method": "gradient", "num_probes": 5}, "differs in method, num_probes"),
        ({"components": ["heads"]}, "differs in components, weights"),
        ({"model": make_model(num_labels=3, intermediate_size=8)}, "differs in weights"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, change, message):
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        estimate_sensitivity(make_model(), interrupted(1), state_file=state, progress=False)
    call = {"model": make_model(), "batches": BATCHES, "state_file": state, "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(**call)


def test_other_batches_are_refused(tmp_path):
    """Users may repeat a call with smaller batches after running out of memory."""
    with pytest.raises(KeyboardInterrupt):
        estimate_sensitivity(make_model(), interrupted(2), state_file=tmp_path / "state", progress=False)
    smaller = [{name: value[:2] for name, value in batch.items()} for batch in BATCHES]
    with pytest.raises(ValueError, match="has 7 examples of 2 batches, these batches have 4"):
        estimate_sensitivity(make_model(), smaller, state_file=tmp_path / "state", progress=False)


def test_something_else_is_refused(tmp_path):
    (tmp_path / "state").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a state file"):
        estimate_sensitivity(make_model(), BATCHES, state_file=tmp_path / "state", progress=False)


def test_goes_on_from_a_file_after_an_interruption_while_costs_are_added_up(tmp_path, monkeypatch):
    state, whole = tmp_path / "state", estimate_sensitivity(make_model(), BATCHES, progress=False)

    def interruption(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted_costs:
        kronecker = dataclasses.replace(METHODS["kronecker"], settle=interruption)
        interrupted_costs.setitem(METHODS, "kronecker", kronecker)
        with pytest.raises(KeyboardInterrupt):
            estimate_sensitivity(make_model(), BATCHES, state_file=state, progress=False)
    no_more = dataclasses.replace(METHODS["kronecker"], sample=lambda *_: pytest.fail("a batch was scored again"))
    monkeypatch.setitem(METHODS, "kronecker", no_more)
    resumed = estimate_sensitivity(make_model(), BATCHES, state_file=state, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.heads, resumed.heads, strict=True))
    assert not state.exists()
