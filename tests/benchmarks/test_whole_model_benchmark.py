"""`benchmarks.whole_model`: a small run, and the table."""

import json
import sys

import pytest
import torch
from encoders import TEXTS

from benchmarks import whole_model
from benchmarks.embeddings_data import Encoder, HeldOut
from benchmarks.whole_model_table import vocabulary_table, whole_model_table


pytestmark = pytest.mark.any_release


def test_cells_of_one_share_have_as_many_parameters(encoder, tmp_path, monkeypatch):
    pairs = torch.arange(8).view(-1, 2)
    held_out = HeldOut(TEXTS[:8], pairs, torch.arange(4.0), {}, {}, {})
    monkeypatch.setattr(Encoder, "load", lambda *args: encoder)
    monkeypatch.setattr(HeldOut, "load", lambda *args: held_out)
    for name in ("calibration_sentences", "sentences_of"):
        monkeypatch.setattr(whole_model, name, lambda *args: TEXTS)
    output = tmp_path / "cells.jsonl"
    arguments = ["whole_model", "--output", str(output), "--shares", "0.4", "0.97", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    whole_model.main()
    first = output.read_text()
    cells = [json.loads(line) for line in first.splitlines()]
    dense, trimmed, *pruned = cells
    assert (dense["way"], trimmed["way"]) == ("dense", "vocabulary") and dense["cosine"] == pytest.approx(1)
    assert trimmed["parameters"] < dense["parameters"] and trimmed["cosine"] == pytest.approx(1, abs=1e-4)
    assert {cell["share"] for cell in pruned} == {0.4}  # Nothing can lose 97 %.
    most = (1 - 0.4) * dense["parameters"]
    for cell in pruned:
        assert 0.7 * most < cell["parameters"] <= most and -1 <= cell["spearman"] <= 1
        known = trimmed if cell["way"].startswith("vocabulary") else dense
        assert cell["parameters"] == known["parameters"] - sum(cell["saved"].values())
    whole_model.main()
    assert output.read_text() == first


def test_the_table():
    cell = {
        "parameters": 20_000_000,
        "encoder_parameters": 1e7,
        "spearman": 0.8,
        "cosine": 0.9,
        "cosine_elsewhere": 0.7,
    }
    seeds = [{**cell, "way": "model", "share": 0.5, "spearman": value, "parameters": 1e7} for value in (0.7, 0.8)]
    cells = [
        {**cell, "way": "dense", "share": 0.0},
        *seeds,
        {**cell, "way": "vocabulary", "share": 0, "parameters": 15e6},
    ]
    assert whole_model_table(cells).splitlines()[2:] == [
        "| nothing | dense | 20.00, 10.00 | 80.0 | 0.900, 0.700 |",
        "| 25% | vocabulary | 15.00, 10.00 | 80.0 | 0.900, 0.700 |",
        "| 50% | model | 10.00, 10.00 | 75.0 (70.0 to 80.0) | 0.900, 0.700 |",
    ]


def test_the_table_of_vocabularies():
    row = {"task": "cola", "texts": 1000, "tokens": 300, "kept": 100, "parameters": {"before": 200, "after": 150}}
    row |= {"validation_texts": 50, "split_otherwise": 10, "unknown_tokens": 0}
    seeds = [
        {**row, "dense": {"loss": 1.0, "accuracy": dense}, "trimmed": {"loss": 1.0, "accuracy": trimmed}}
        for dense, trimmed in ((0.9, 0.88), (0.8, 0.81))
    ]
    assert vocabulary_table(seeds).splitlines()[2:] == [
        "| cola | 1,000 | 100 of 300 | 25% | 20% | 0 | 85.0 | -0.5 (-2.0 to +1.0) |"
    ]
