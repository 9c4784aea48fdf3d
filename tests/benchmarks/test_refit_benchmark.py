"""`benchmarks.refit`: its divergence, its ratios, and a small refit."""

import copy

import pytest
import torch
from in_process import run_here
from tiny import make_batches
from zoo import ZOO

from benchmarks import refit
from benchmarks.markdown_table import refit_costs_table, refit_examples_table


def test_divergence():
    model, batches = ZOO["bert"].model(), make_batches(ZOO["bert"])
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        shifted.classifier.bias += torch.tensor([0.5, *[0.0] * (len(shifted.classifier.bias) - 1)])
    first, second = (torch.cat([m(**batch).logits for batch in batches]).softmax(-1) for m in (shifted, model))
    expected = (second * (second / first).log()).sum(-1).mean().item()
    assert refit.divergence(shifted, model, batches) == pytest.approx(expected, rel=1e-9)
    assert refit.divergence(model, model, batches) == 0


def test_refits_by_its_command(monkeypatch):
    """Here, what a new process would be told to run."""
    monkeypatch.setattr(refit.subprocess, "run", run_here)
    found = refit.measure(32)
    assert found["examples"] == 32 and found["seconds"] > 0 and found["peak"] > 1e8


def test_ratios():
    rounds = [[{"peak": 2e9, "seconds": 1.0}, {"peak": 2.2e9, "seconds": 8.4}]] * 3
    memory, seconds = refit.growth(rounds)
    assert memory["ratio"] == pytest.approx(1.1) and seconds["ratio"] == pytest.approx(1.05)
    lines = refit_costs_table([memory, seconds]).splitlines()
    assert lines[2] == "| peak memory of the process | 2.00 GB | 2.20 GB | 1.10 (1.10 to 1.10) | 1.10 |"
    assert lines[3] == "| seconds an example | 1.00 s | 8.40 s | 1.05 (1.05 to 1.05) | 1.05 |"


def test_table_of_examples():
    rows = [
        {"task": "cola", "seed": seed, "ratio": 0.6, "examples": examples, "kl": kl, "seconds": 4.0}
        for seed in (0, 1)
        for examples, kl in ((512, 0.06), (1024, 0.04), (2048, 0.03))
    ]
    lines = refit_examples_table(rows).splitlines()
    assert lines[0] == "| task | removed | 512 | 1,024 | 2,048 |"
    assert lines[2] == "| cola | 60% | 1.50, 4 s | KL 0.0400, 4 s | 0.75, 4 s |"
