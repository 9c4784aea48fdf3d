"""`benchmarks.residual_width`: the projections, and a small run."""

import json
import sys

import pytest
import torch
from encoders import TEXTS

from benchmarks import residual_width
from benchmarks.embeddings_data import Encoder, HeldOut
from benchmarks.residual_width import CHOICES, Stream, norms_of, projected, streams
from benchmarks.whole_model_table import width_table


pytestmark = pytest.mark.any_release


def test_the_output_aware_projection_is_the_best_in_both_metrics():
    """What it changes of the outputs is the sum of the smallest eigenvalues of the product of both moments."""
    torch.manual_seed(0)
    roots = torch.randn(2, 6, 6, dtype=torch.float64)
    moment, curvature = (root @ root.T for root in roots)
    stream, rest = Stream(torch.zeros(6), moment, curvature), {}
    for name, choose in CHOICES.items():
        projection = choose(stream, 4)
        torch.testing.assert_close(projection @ projection, projection, rtol=1e-6, atol=1e-8)
        assert torch.linalg.matrix_rank(projection) == 4
        left = torch.eye(6, dtype=torch.float64) - projection
        rest[name] = (left.T @ curvature @ left @ moment).trace()
    smallest = torch.linalg.eigvals(moment @ curvature).real.sort().values[:2].sum()
    torch.testing.assert_close(rest["output-aware"], smallest, rtol=1e-2, atol=0)
    assert rest["output-aware"] < rest["variance"]


def test_a_projection_on_all_directions_changes_nothing(encoder):
    found = streams(encoder, TEXTS)
    width = len(found[0].mean)
    assert len(found) == len(norms_of(encoder))
    expected = encoder.embed(encoder.model, TEXTS)
    for choose in CHOICES.values():
        with projected(encoder, [choose(s, width) for s in found], [s.mean for s in found]):
            torch.testing.assert_close(encoder.embed(encoder.model, TEXTS), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(encoder.embed(encoder.model, TEXTS), expected)


def test_a_small_run(encoder, tmp_path, monkeypatch):
    held_out = HeldOut(TEXTS[:8], torch.arange(8).view(-1, 2), torch.arange(4.0), {}, {}, {})
    monkeypatch.setattr(Encoder, "load", lambda *args: encoder)
    monkeypatch.setattr(HeldOut, "load", lambda *args: held_out)
    for module in ("residual_width", "whole_model"):
        monkeypatch.setattr(f"benchmarks.{module}.calibration_sentences", lambda *args: TEXTS)
    output = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["residual_width", "--output", str(output), "--widths", "0.75"])
    residual_width.main()
    dense, *rows = json.loads(output.read_text())
    assert dense["cosine"] == pytest.approx(1) and len(rows) == 6
    assert rows[-1]["parameters"] == rows[-2]["parameters"] <= rows[0]["parameters"]
    assert all(row["parameters"] < dense["parameters"] for row in rows if "each" not in row["way"])
    lines = width_table([dense, *rows]).splitlines()
    assert len(lines) == 2 + 7 and lines[2].startswith("| dense |")
