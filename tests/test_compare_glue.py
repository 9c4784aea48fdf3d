"""The comparison on a tiny task: cells, their resumption and the table."""

import json
import operator

import comparison_job
import pytest
from compare_glue import _each, _pool, main
from comparison_job import Job, Setting
from comparison_methods import CONTROL, METHODS
from comparison_table import table
from datasets import ClassLabel, Dataset, load_dataset
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
    monkeypatch.setattr(comparison_job, "demo_model_path", lambda: str(model_dir))
    monkeypatch.setitem(comparison_job.SETTINGS, "sst2", Setting(16, 1, 8, 1, held_out=8))
    own = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--tasks", "sst2", "--seeds", "0"]
    return [*own, "--ratios", "0.5"]


def test_every_method_once_and_never_again(tiny, tmp_path, monkeypatch, capsys):
    cells = main([*tiny, "--methods", *METHODS])
    assert [cell["method"] for cell in cells] == list(METHODS)
    by_method = {cell["method"]: cell for cell in cells}
    for cell in cells:
        dense, pruned = cell["parameters"]["dense"], cell["parameters"]["pruned"]
        assert (pruned < dense) == (cell["method"] != CONTROL)
        assert set(cell["recovered"]) == {"accuracy", "loss"} and set(cell["seconds"]) == {"score", "prune", "recover"}
    control = by_method[CONTROL]
    assert control["ratio"] == 0 and control["pruned"] == control["dense"]
    dropped = by_method["top layers dropped"]
    assert dropped["heads"][1] == dropped["neurons"][1] == 0  # Half the encoder is a bit more than a layer's blocks.
    assert dropped["heads"][0] >= 3 and dropped["neurons"][0] >= 16
    monkeypatch.setattr(Job, "run", lambda *_: pytest.fail("the cell was run again"))
    assert main([*tiny, "--methods", *METHODS]) == cells
    lines = (tmp_path / "out" / "cells.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == cells
    assert "| hap | " in capsys.readouterr().out


def test_heads_alone(tiny):
    cells = main([*tiny, "--methods", "hap", "gradient", "random", "--budget", "heads", "--recover", "False"])
    for cell in cells:
        assert sum(cell["heads"]) == 4 and set(cell["neurons"]) == {24} and "recovered" not in cell


def test_a_fold_is_not_trained_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(comparison_job.SETTINGS, "sst2", Setting(None, 1, None, 1))
    job = Job("sst2", 0, str(tmp_path), tmp_path / "out", fold=True)
    assert len(job.train) == 26 and len(job.evaluated) == 6
    (cell,) = main([*tiny, "--methods", "hap", "--fold", "--recover", "False"])
    assert cell["fold"] and "recovered" not in cell


def test_a_fold_of_phrases_shares_no_sentence_with_training(tmp_path, tiny, monkeypatch):
    texts = ["a b c d", "a b", "x a b c d y", "b c", "e f g h", "f g", "e", "k l m n"]
    rows = {"sentence": texts, "label": [0, 1] * 4}
    features = load_dataset("parquet", data_files=str(tmp_path / "sst2" / "train.parquet"))["train"].features
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "sst2" / "train.parquet")
    monkeypatch.setitem(comparison_job.SETTINGS, "sst2", Setting(None, 1, None, 1, held_out=1, fold_words=4))
    job = Job("sst2", 0, str(tmp_path), tmp_path / "out", fold=True)
    order = job.task.data["train"].shuffle(seed=0)["sentence"]
    kept, held = ([order[i] for i in part] for part in job._fold(job.task.data["train"].shuffle(seed=0)))
    assert len(held) == len(job.evaluated) == 1 and len(held[0].split()) >= 4
    assert set(kept) == {text for text in texts if text not in held[0] and held[0] not in text}


def test_workers_share_the_cells_and_stop_at_an_error():
    with _pool(2) as pool:
        assert sorted(_each(pool, operator.mul, "", 2, [(3,), (4,), (5,)])) == [6, 8, 10]
        with pytest.raises(ZeroDivisionError):
            list(_each(pool, operator.truediv, "", 2, [(0,)]))


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
