"""The benchmarks' contenders run, and their yardsticks measure."""

import sys

import pytest
import torch
from conftest import ROOT, make_batch, make_model


sys.path.insert(0, str(ROOT / "benchmarks"))
import markdown_table  # noqa: E402
import workloads  # noqa: E402


def test_peak_memory_counts_what_is_there_at_once():
    def contender():
        for _ in range(3):
            first = torch.zeros(2**20)
            second = torch.zeros(2**19)
            del first, second

    assert workloads.peak_memory(contender) == pytest.approx(6, rel=0.01)


@pytest.mark.parametrize("bf16", [False, True])
def test_contenders(bf16):
    model, batches = make_model(dtype=torch.float32), [make_batch()]
    workloads.forward_backward(model, batches, bf16)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert workloads.gauss_newton(model, batches, bf16).num_probes == 0
    assert workloads.hutchinson(model, batches, bf16).num_probes == workloads.PROBES


def test_the_peer():
    pytest.importorskip("pyhessian", reason="pyhessian is not installed")
    assert workloads.pyhessian(make_model(dtype=torch.float32), [make_batch()]) > 0


def test_table():
    row = {"measure": "a / b", "target": 0.9, "ratio": 0.5, "smallest": 0.4, "largest": 0.6}
    text = markdown_table.table([{**row, "values": [1.0, 2.0], "unit": "s"}])
    assert text.splitlines()[-1] == "| a / b | 0.50 (0.40 to 0.60) | 0.90 | 1.00 / 2.00 s |"
