"""Tasks: what is loaded from GLUE and from the user's own files, and how it is measured."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, load_dataset
from script_inputs import ROWS, write_csv
from tiny import GLUE, needs_glue
from transformers import EvalPrediction

from hap_transformers import tasks


def test_parquet_files_without_names_of_labels(tmp_path):
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        Dataset.from_dict({"sentence": ["a"], "label": [1]}).to_parquet(tmp_path / "sst2" / f"{split}.parquet")
    with pytest.raises(ValueError, match="'sst2' are int64 without names. Write the files with `datasets`"):
        tasks.load_task("sst2", str(tmp_path))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"sentence": ["a", "b"], "label": [0, -1]}, "validation split of task 'sst2' has examples without a label"),
        ({"text": ["a", "b"], "label": [0, 1]}, "Task 'sst2' lacks sentence; its columns are"),
        (None, "validation.parquet as parquet: "),
    ],
)
def test_parquet_files_that_are_spoiled(tmp_path, columns, message):
    (tmp_path / "sst2").mkdir()
    good = {"sentence": ["a", "b"], "label": [0, 1]}
    first = columns if columns and "sentence" not in columns else good
    for split, given in (("train", first), ("validation", columns)):
        file = tmp_path / "sst2" / f"{split}.parquet"
        if given is None:
            file.write_bytes(b"spoiled")
        else:
            data = Dataset.from_dict(given)
            data.cast_column("label", ClassLabel(names=["negative", "positive"])).to_parquet(file)
    with pytest.raises(ValueError, match=message):
        tasks.load_task("sst2", str(tmp_path))


@pytest.mark.parametrize(
    "header, message", [("sentence,score", "it needs 'label'"), ("a,b,c,label", "keep the one or two to classify")]
)
def test_wrong_columns(tmp_path, header, message):
    row = ",".join("yes" for _ in header.split(","))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(ValueError, match=message):
        tasks.load_task(train_file=str(tmp_path / "train.csv"), validation_file=str(tmp_path / "validation.csv"))


def test_numbers_are_classes_in_their_own_order(tmp_path):
    file = write_csv(tmp_path / "rows.csv", [(f"film {i}", i) for i in (10, 2, 0, 1, 9, 11, 3)])
    assert tasks.load_task(train_file=file, validation_file=file).labels == ["0", "1", "2", "3", "9", "10", "11"]


@pytest.mark.parametrize(
    "row, message",
    [({"text": "film", "label": None}, "no label in row 2"), ({"text": None, "label": "a"}, "no text in row 2")],
)
def test_rows_with_something_missing(tmp_path, row, message):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"text": "good film", "label": "b"}, row])))
    with pytest.raises(ValueError, match=rf"rows.jsonl' has {message}; fill or remove it"):
        tasks.load_task(train_file=str(file), validation_file=str(file))


def test_columns_that_are_no_text(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"{i} film", "label": i, "tags": ["a"], "about": {"source": "b"}} for i in range(2)]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert tasks.load_task(train_file=str(file), validation_file=str(file)).texts == ("text",)
    file.write_text("\n".join(json.dumps({**row, "label": ["a", "b"]}) for row in rows))
    with pytest.raises(ValueError, match="each row needs one number or word"):
        tasks.load_task(train_file=str(file), validation_file=str(file))


def test_validation_with_an_unseen_label(tmp_path):
    files = [write_csv(tmp_path / "t.csv", ROWS), write_csv(tmp_path / "v.csv", [("good", "maybe")])]
    with pytest.raises(ValueError, match=r"lacks: \['maybe'\]"):
        tasks.load_task(train_file=files[0], validation_file=files[1])


def test_metrics_by_hand():
    labels = np.array([0, 1, 1, 0])
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])  # predicts 0, 1, 0, 1
    prediction = EvalPrediction(logits, labels)
    assert tasks.Task("mrpc", None, (), ["0", "1"]).metrics()(prediction) == {"accuracy": 0.5, "f1": 0.5}
    assert tasks.Task("cola", None, (), ["0", "1"]).metrics()(prediction) == {"matthews_correlation": 0.0}
    with_states = EvalPrediction((logits, np.zeros((4, 7))), labels)  # What encoder-decoders give.
    assert tasks.Task("rte", None, (), ["0", "1"]).metrics()(with_states) == {"accuracy": 0.5}
    regression = EvalPrediction(np.array([[1.0], [2.0], [9.0]]), np.array([1.0, 2.0, 3.0]))
    result = tasks.Task("stsb", None, (), None).metrics()(regression)
    # Centred: (-3, -2, 5) and (-1, 0, 1), so 8 / sqrt(38 * 2).
    assert result["pearson"] == pytest.approx(8 / 76**0.5) and result["spearmanr"] == pytest.approx(1)


@needs_glue
@pytest.mark.parametrize("task_name", ["cola", "mrpc", "sst2", "stsb", "wnli"])
def test_glue_tasks_load_from_parquet(task_name):
    task = tasks.load_task(task_name, data_dir=str(GLUE))
    assert task.labels is None if task_name == "stsb" else len(task.labels) == 2
    assert set(task.texts) <= set(task.data["train"].column_names)


def test_mnli_takes_the_matched_validation(tmp_path):
    folder = tmp_path / "mnli"
    folder.mkdir()
    source = tmp_path / "rows.csv"
    source.write_text("premise,hypothesis,label\na,b,0\n")
    for split in ("train", "validation_matched"):
        load_dataset("csv", data_files=str(source))["train"].class_encode_column("label").to_parquet(
            folder / f"{split}.parquet"
        )
    task = tasks.load_task("mnli", data_dir=str(tmp_path))
    assert task.texts == ("premise", "hypothesis") and len(task.data["validation"]) == 1
