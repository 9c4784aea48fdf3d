"""Untrusted files run nothing, open nothing outside their folder, and are refused by the package's errors."""

import copy
import json
import re
import resource
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import LONG, ROOT, make_batch, make_model
from transformers import AutoModelForSequenceClassification

import hap_transformers as hap


# Examples of each kind of file; the long form takes about five minutes on a quiet machine.
EXAMPLES = 5000 if LONG else 60
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
GIBIBYTE = 2**20  # In the units of ru_maxrss.

LAYERS = st.sampled_from(["0", "1", "2", "-1", "1e3", "", "None"]) | st.text(max_size=3)
NUMBERS = st.integers(-3, 30) | st.sampled_from([2**31, 2**63, 10**30, -1])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(LAYERS, v, max_size=3), max_leaves=6
)
COUNTS = st.dictionaries(LAYERS, NUMBERS, max_size=3) | VALUES
REMOVED = st.dictionaries(LAYERS, st.lists(NUMBERS, max_size=4) | SCALARS, max_size=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A pruned model's folder, its config and its plan."""
    folder = tmp_path_factory.mktemp("pruned")
    model = make_model(dtype=torch.float32)
    plan = hap.PruningPlan.for_model(model, heads={0: [1]}, neurons={1: range(5)}, implants={1: 2})
    plan.save(folder / "plan.json")
    hap.apply_plan(model, plan)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    return make_model(dtype=torch.float32)


@pytest.fixture(autouse=True)
def little_memory():
    """Each test takes at most 2 GiB more memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * GIBIBYTE


@FUZZ
@given(
    changes=st.fixed_dictionaries({}, optional={"heads": COUNTS, "neurons": COUNTS, "implants": COUNTS, "x": VALUES})
)
def test_structures_that_someone_else_wrote(checkpoint, tmp_path, changes):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= changes
    load_with(checkpoint, tmp_path, config)


@FUZZ
@given(pruned_heads=REMOVED)
def test_pruned_heads_that_someone_else_wrote(checkpoint, tmp_path, pruned_heads):
    config = json.loads((checkpoint / "config.json").read_text())
    load_with(checkpoint, tmp_path, {**config, "pruned_heads": pruned_heads})


def load_with(checkpoint, folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    if not weights.exists():
        weights.write_bytes((checkpoint / "model.safetensors").read_bytes())
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    except ValueError:
        return
    assert torch.isfinite(loaded(**make_batch()).loss)


@FUZZ
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "removed": st.fixed_dictionaries({}, optional={"heads": REMOVED | VALUES, "neurons": REMOVED | VALUES})
            | VALUES,
            "implants": COUNTS,
            "original": st.fixed_dictionaries({}, optional={"heads": VALUES, "neurons": VALUES}) | VALUES,
            "promise": COUNTS,
            "model_type": SCALARS,
            "x": VALUES,
        },
    )
)
def test_plans_that_someone_else_wrote(checkpoint, tmp_path, model, changes):
    values = json.loads((checkpoint / "plan.json").read_text())
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**values, **changes}))
    pruned = copy.deepcopy(model)
    try:
        hap.apply_plan(pruned, hap.PruningPlan.load(path))
    except ValueError:
        return
    assert torch.isfinite(pruned(**make_batch()).loss)


def edits(data, positions, values, length):
    """Changes bytes at some positions, and cuts."""
    data = bytearray(data)
    for position, value in zip(positions, values, strict=False):
        data[position % len(data)] = value
    return bytes(data[: max(1, int(length * len(data)))])


BYTES = {
    "positions": st.lists(st.integers(0, 500) | st.integers(0), max_size=6),
    "values": st.lists(st.integers(0, 255), min_size=6, max_size=6),
    "length": st.just(1.0) | st.floats(0, 1),
}


@FUZZ
@given(**BYTES)
def test_scores_with_other_bytes(tmp_path, model, positions, values, length):
    whole, path = tmp_path / "whole", tmp_path / "scores"
    scores = hap.estimate_sensitivity(model, [make_batch()], "magnitude", progress=False)
    scores.save(whole)
    path.write_bytes(edits(whole.read_bytes(), positions, values, length))
    try:
        hap.plan_pruning(hap.Sensitivity.load(path), model, ratio=0.3, neuron_multiple=1)
    except ValueError:
        pass


@FUZZ
@given(**BYTES)
def test_text_files_with_other_bytes(checkpoint, tmp_path, positions, values, length):
    path = tmp_path / "file"
    path.write_bytes(edits((checkpoint / "plan.json").read_bytes(), positions, values, length))
    for kind in (hap.PruningPlan, hap.LatencyTable):
        try:
            kind.load(path)
        except ValueError:
            pass


def test_loading_opens_nothing_elsewhere_and_runs_nothing(checkpoint, tmp_path):
    elsewhere, folder, opened = tmp_path / "elsewhere", tmp_path / "model", []
    elsewhere.mkdir()
    folder.mkdir()
    for file in checkpoint.iterdir():
        for target in (elsewhere, folder):
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.Evil"}
    config |= {"_name_or_path": str(elsewhere), "name_or_path": str(elsewhere)}
    (folder / "config.json").write_text(json.dumps(config))
    for target in (elsewhere, folder):
        (target / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    watching = [True]

    def watch(event, arguments):
        if watching and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | Path):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    AutoModelForSequenceClassification.from_pretrained(folder)
    watching.clear()
    assert not (tmp_path / "was_run").exists()
    opened = [path for path in opened if path.startswith(str(tmp_path))]
    assert opened and all(path.startswith(str(folder)) and not path.endswith("evil.py") for path in opened)


def test_text_files_nested_deep(tmp_path):
    path = tmp_path / "file"
    path.write_text('{"heads": ' + 100_000 * "[")
    for kind in (hap.PruningPlan, hap.LatencyTable):
        with pytest.raises(ValueError, match="is not a "):
            kind.load(path)


def test_nothing_is_pickled(tell):
    tell(fuzzed=EXAMPLES)  # If a test above failed, so did the run.
    package = ROOT / "hap_transformers"
    # It reads only what the same object wrote into a new folder that no other user may enter.
    own = package / "refit" / "kept_values.py"
    for file in sorted(set(package.rglob("*.py")) - {own}):
        source = file.read_text()
        assert not re.search(r"\bpickle\b|torch\.(load|save)\(|(?<!\.)\b(eval|exec|__import__)\(", source), file
