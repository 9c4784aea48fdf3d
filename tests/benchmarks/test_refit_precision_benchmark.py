"""`benchmarks.refit_precision`: its distance, its ratios, and rounds of a tiny model."""

import copy

import pytest
import torch
from tiny import make_batches
from zoo import ZOO

from benchmarks import refit_precision
from benchmarks.markdown_table import table


def test_distance():
    model, batches = ZOO["bert"].model(torch.float32), make_batches(ZOO["bert"])
    shifted = copy.deepcopy(model)
    norm = shifted.base_model.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        norm.bias += 0.5
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    expected = []
    for batch in inputs:
        states = model.base_model(**batch).last_hidden_state[batch["attention_mask"].bool()]
        expected.append(0.25 / states.square().mean().item())
    found = refit_precision.distance(shifted, model, inputs)
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_rounds_and_ratios():
    tiny = ZOO["bert"]
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in make_batches(tiny, 2)]
    args = refit_precision.Arguments(ratio=0.5, repeats=2)
    rounds = refit_precision.measure(tiny.model(torch.float32), inputs, inputs, args)
    assert [list(found) for found in rounds] == [["no", "bf16"]] * 2
    assert all(0 < found[precision]["distance"] < 1 for found in rounds for precision in found)
    rounds = [
        {"no": {"refit": 4.0, "distance": 0.1}, "bf16": {"refit": seconds, "distance": 0.11}} for seconds in (2, 1)
    ]
    rows = [refit_precision.compared("MiniLM", name, rounds, 0.75) for name in ("refit", "distance")]
    assert table(rows).splitlines()[2:] == [
        "| MiniLM, refit | 0.38 (0.25 to 0.50) | 0.75 | 1.50 / 4.00 s |",
        "| MiniLM, distance | 1.10 (1.10 to 1.10) | 0.75 | 11 / 10 % |",
    ]
