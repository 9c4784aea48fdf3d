"""`benchmarks.memory`: its formulas, and its jobs on a small model."""

import pytest
import torch
from in_process import run_here
from transformers import LlamaForCausalLM

from benchmarks import markdown_table, memory
from hap_transformers import METHODS
from hap_transformers.components.groups import find_groups
from hap_transformers.sensitivity.by_parts import parts_within
from hap_transformers.sensitivity.precision import Precision
from hap_transformers.sensitivity.surgeon import elimination_bytes
from hap_transformers.sensitivity.task import ScoringTask, model_loss


@pytest.fixture(params=["tiny", "0.1", "1"])
def shape_and_model(request):
    shape = memory.SHAPES[request.param]
    with torch.device("meta"):
        return shape, LlamaForCausalLM(shape.config())


def test_bytes_of_the_model(shape_and_model):
    shape, model = shape_and_model
    assert shape.model_bytes() == 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_bytes_of_the_largest_part(shape_and_model, share):
    shape, model = shape_and_model
    max_memory = round(share * shape.model_bytes())
    task = ScoringTask(model, find_groups(model), model_loss, 1, Precision(None, "cpu"), 0)
    scoring = METHODS["kronecker"]
    needs = []
    for groups in parts_within(task, scoring, max_memory):
        sums = 8 * scoring.num_sums(ScoringTask(model, groups, model_loss, 1, Precision(None, "cpu"), 0))
        needs.append(sums + max(elimination_bytes(group.reader.in_features) for group in groups))
    assert shape.score_bytes(max_memory) - shape.model_bytes() == pytest.approx(max(needs), rel=0.01)


def test_jobs_run(monkeypatch):
    """Here, what a new process would be told to run."""
    monkeypatch.setattr(memory.subprocess, "run", run_here)
    found = memory.measure("tiny", "score")
    assert found["before"] > 1e8 and 0 <= found["peak"] < 1e8 and found["seconds"] > 0
    model = LlamaForCausalLM(memory.SHAPES["tiny"].config())
    before = model.num_parameters()
    memory.forward_backward("tiny", model)
    assert all(parameter.grad is None for parameter in model.parameters())
    memory.refit("tiny", model)
    assert model.num_parameters() < before


def test_table():
    computed = memory.rows_of("8", {})
    assert [row["job"] for row in computed] == ["score", "refit"]
    lines = markdown_table.memory_table(computed).splitlines()
    assert lines[2].startswith("| 8 billion | score | 32.") and lines[2].endswith(" |  |  |")
    rows = memory.rows_of("1", {"pass": {"peak": 5e9}, "score": {"peak": 8e9}})
    lines = markdown_table.memory_table(rows).splitlines()
    assert lines[2] == "| 1 billion | pass | 4.42 |  | 5.00 |  |"
    assert lines[3].endswith("| 8.00 | 9.42 |")
