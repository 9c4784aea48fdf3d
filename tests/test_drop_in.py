"""The changes in `docs/how_to/run_glue.md` work when they are applied to a script of that shape."""

import json
import re
import runpy
import sys

import pytest
from safetensors.torch import load_file
from script_inputs import ROWS, write_csv
from tiny import ROOT
from transformers import AutoModelForSequenceClassification


SCRIPT = (ROOT / "tests" / "glue_shaped.py").read_text()
PAGE = (ROOT / "docs" / "how_to" / "run_glue.md").read_text()
DIFFS = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def changed(script, diff):
    """Applies a diff to a script, which must contain the diff's old lines once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert script.count(before) == 1, before
    return script.replace(before, after)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, model_dir):
    """Runs a script and returns its output folder and what it printed."""
    rows = [(text, int(label == "yes")) for text, label in ROWS]
    files = [write_csv(tmp_path / f"{split}.csv", rows) for split in ("train", "validation")]

    def run(script, name):
        (tmp_path / f"{name}.py").write_text(script)
        flags = ["--model_name_or_path", model_dir, "--train_file", files[0], "--validation_file", files[1]]
        flags += [
            "--do_train",
            "--do_eval",
            "--do_predict",
            "--use_cpu",
            "--report_to",
            "none",
            "--save_strategy",
            "no",
        ]
        flags += ["--output_dir", tmp_path / name, "--num_train_epochs", 2, "--disable_tqdm", "True"]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        runpy.run_path(str(tmp_path / f"{name}.py"))["main"]()
        return tmp_path / name, capsys.readouterr().out

    return run


def test_four_changes_make_the_script_prune(run, model_dir):
    script = SCRIPT
    for diff in DIFFS:
        script = changed(script, diff)
    assert len(DIFFS) == 3 and sum(line[0] == "+" for diff in DIFFS for line in diff.splitlines()) == 4
    out, printed = run(script, "pruned")
    model = AutoModelForSequenceClassification.from_pretrained(out)
    dense = AutoModelForSequenceClassification.from_pretrained(model_dir)
    left, all_ = (sum(p.numel() for p in one.base_model.encoder.parameters()) for one in (model, dense))
    assert left < 0.5 * all_  # The 60 % do not include norms and output biases.
    metrics = json.loads((out / "all_results.json").read_text())
    assert metrics["train_samples"] == metrics["eval_samples"] == len(ROWS)
    assert set(json.loads(printed.splitlines()[-1])) <= {0, 1}
    assert "pruned" in (out / "README.md").read_text()


def test_without_pruning_it_is_the_trainer(run):
    """The class alone changes nothing: weights are bit-identical."""
    weights = []
    for name, script in (("dense", SCRIPT), ("renamed", changed(changed(SCRIPT, DIFFS[0]), DIFFS[1]))):
        out, _ = run(script, name)
        weights.append(load_file(out / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
