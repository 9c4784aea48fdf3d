"""The comparison on a tiny task: cells, their resumption and the table."""

import json

import compare_glue
import pytest
from compare_glue import METHODS, Setting, main
from comparison_table import table
from datasets import ClassLabel, Dataset
from test_scripts import ROWS, model_dir  # noqa: F401


@pytest.fixture
def tiny(tmp_path, model_dir, monkeypatch):  # noqa: F811
    """Flags for a task of a few sentences and a tiny model."""
    rows = {"sentence": [text for text, _ in ROWS], "label": [int(label == "yes") for _, label in ROWS]}
    (tmp_path / "sst2").mkdir()
    features = Dataset.from_dict(rows).features
    features["label"] = ClassLabel(names=["negative", "positive"])
    for split in ("train", "validation"):
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "sst2" / f"{split}.parquet")
    monkeypatch.setattr(compare_glue, "demo_model_path", lambda: str(model_dir))
    monkeypatch.setitem(compare_glue.SETTINGS, "sst2", Setting(24, 1, 8, 1))
    monkeypatch.setattr(compare_glue, "FOLD", 8)
    own = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--tasks", "sst2", "--seeds", "0"]
    return [*own, "--ratios", "0.5"]


def test_every_method_once_and_never_again(tiny, tmp_path, monkeypatch, capsys):
    cells = main([*tiny, "--methods", *METHODS])
    assert [cell["method"] for cell in cells] == list(METHODS)
    for cell in cells:
        dense, pruned = cell["parameters"]["dense"], cell["parameters"]["pruned"]
        assert pruned < dense and set(cell["recovered"]) == {"accuracy", "loss"}
    by_method = {cell["method"]: cell for cell in cells}
    dropped = by_method["top layers dropped"]
    assert dropped["heads"][1] == dropped["neurons"][1] == 0  # Half the encoder is a bit more than a layer's blocks.
    assert dropped["heads"][0] >= 3 and dropped["neurons"][0] >= 16
    monkeypatch.setattr(compare_glue.Job, "run", lambda *_: pytest.fail("the cell was run again"))
    assert main([*tiny, "--methods", *METHODS]) == cells
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == cells
    assert "| hap | " in capsys.readouterr().out


def test_a_fold_is_not_trained_on(tiny, tmp_path):
    job = compare_glue.Job(compare_glue.Arguments(str(tmp_path), str(tmp_path / "out"), fold=True), "sst2", 0)
    job._prepare()
    assert len(job.train) == 24 and len(job.evaluated) == 8
    (cell,) = main([*tiny, "--methods", "hap", "--fold", "--recover", "False"])
    assert cell["fold"] and "recovered" not in cell


def test_unknown_names_are_refused(tiny):
    with pytest.raises(ValueError, match="Unknown .'magic'"):
        main([*tiny, "--methods", "magic"])


def test_table():
    cells = [
        {
            "task": task,
            "method": "hap",
            "ratio": 0.6,
            "seed": seed,
            "dense": {"accuracy": 0.8},
            "pruned": {"accuracy": accuracy},
        }
        for task, values in (("mrpc", (0.79, 0.77)), ("sst2", (0.81, 0.81)))
        for seed, accuracy in enumerate(values)
    ]
    assert table(cells).splitlines()[-1] == "| hap | -2.0 ± 1.4 | +1.0 ± 0.0 | -0.5 |"
