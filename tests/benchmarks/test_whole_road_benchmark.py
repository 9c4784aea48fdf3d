"""`benchmarks.whole_road` on a tiny shape."""

import json
import sys

import pytest

from benchmarks import whole_road


pytestmark = pytest.mark.any_release


@pytest.mark.reliability
def test_the_road_of_a_tiny_shape(tmp_path, monkeypatch, capsys):
    output = tmp_path / "road.json"
    monkeypatch.setattr(sys, "argv", ["whole_road", "--shape", "tiny", "--output", str(output)])
    whole_road.main()
    result = json.loads(output.read_text())
    phases = [row["phase"] for row in result["phases"]]
    assert phases == ["make", "score", "plan and surgery", "refit", "save", "generate", "load"]
    peaks = [row["gib"] for row in result["phases"]]
    assert peaks == sorted(peaks) and result["same_tokens"] and 0.5 < result["kept"] <= 0.7
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 1 + len(phases) and "the same tokens" in printed
