"""`benchmarks.whole_classifiers` on a tiny model."""

import sys

import pytest
from tiny_comparison import make_tiny

from benchmarks import whole_classifiers
from benchmarks.whole_model_table import classifiers_table
from glue_scripts.compare_glue.cells import read_cells


pytestmark = pytest.mark.any_release


def test_a_cell_keeps_its_promise_and_is_computed_once(tmp_path, model_dir, monkeypatch):
    make_tiny(tmp_path, model_dir, monkeypatch)
    folders = ["--data_dir", str(tmp_path), "--dense_dir", str(tmp_path / "out")]
    output = tmp_path / "cells.jsonl"
    command = ["whole_classifiers", *folders, "--output", str(output), "--tasks", "sst2", "--ratios", "0.4"]
    monkeypatch.setattr(sys, "argv", command)
    whole_classifiers.main()
    ((key, cell),) = read_cells(output, whole_classifiers.Key).items()
    parameters = cell["parameters"]
    assert key == ("sst2", 0.4, 0) and 0.4 * parameters["dense"] <= sum(cell["saved"].values())
    assert parameters["dense"] - parameters["pruned"] == sum(cell["saved"].values())
    monkeypatch.setattr(whole_classifiers, "cell_of", lambda *args: pytest.fail("computed again"))
    whole_classifiers.main()


def test_the_table():
    def cell(ratio, seed, dense, pruned, recovered):
        phases = {"dense": dense, "pruned": pruned, "recovered": recovered}
        metrics = {phase: {"loss": 1.0, "accuracy": value} for phase, value in phases.items()}
        return {"task": "sst2", "ratio": ratio, "seed": seed, "saved": {"embedding_dims": 3, "heads": 1}, **metrics}

    cells = [cell(0.7, 0, 0.9, 0.8, 0.85), cell(0.5, 0, 0.9, 0.89, 0.91), cell(0.5, 1, 0.8, 0.77, 0.8)]
    assert classifiers_table(cells).splitlines()[2:] == [
        "| sst2 | 85.0 | 50% | 75% | -2.0 (-3.0 to -1.0) | +0.5 (+0.0 to +1.0) |",
        "| sst2 | 90.0 | 70% | 75% | -10.0 | -5.0 |",
    ]
