"""The main job on small inputs, and what it says to wrong ones."""

import json
import shutil

import numpy as np
import pytest
import run_glue_hap
import torch
from conftest import GLUE, make_model, needs_glue
from datasets import Dataset, load_dataset
from demo_data import load_demo_dataset
from run_glue_hap import main
from transformers import AutoModelForSequenceClassification, BertTokenizerFast, EvalPrediction

from hap_transformers import HapTrainer, PruningPlan, Sensitivity, tasks


WORDS = [*"abcdefghijklmnopqrstuvwxyz", "good", "bad", "film", "plot"]


@pytest.fixture
def model_dir(tmp_path):
    """A tiny BERT with a tokenizer, saved."""
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    folder = tmp_path / "model"
    BertTokenizerFast(vocab_file=str(vocabulary), vocab=str(vocabulary)).save_pretrained(folder)
    model = make_model(vocab_size=40)
    model.float().base_model.save_pretrained(folder)
    return folder


def write_csv(path, rows):
    path.write_text("\n".join(["sentence,label", *(f"{text},{label}" for text, label in rows)]))
    return str(path)


ROWS = [("good film", "yes"), ("bad plot", "no"), ("good plot", "yes"), ("bad film", "no")] * 8


def flags(tmp_path, model_dir, *more):
    own = ["--model_name_or_path", str(model_dir), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    return [*own, "--disable_tqdm", "True", "--num_train_epochs", "1", *more]


def own_files(tmp_path):
    files = [write_csv(tmp_path / f"{split}.csv", ROWS) for split in ("train", "validation")]
    return ["--train_file", files[0], "--validation_file", files[1]]


def test_own_csv_end_to_end(tmp_path, model_dir, capsys):
    results = main(
        flags(
            tmp_path,
            model_dir,
            *own_files(tmp_path),
            "--budget",
            "heads",
            "--ratio",
            "0.5",
            "--per_device_train_batch_size",
            "8",
        )
    )
    out = tmp_path / "out"
    assert results == json.loads((out / "results.json").read_text())
    assert set(results["metrics"]) == {"dense", "pruned", "recovered"}
    assert results["heads"] == {"dense": 8, "pruned": 4}
    assert results["parameters"]["dense"] - results["parameters"]["pruned"] == 4 * (4 * 4 * 16 + 3 * 4)
    assert results["flops"]["pruned"] < results["flops"]["dense"]
    assert results["num_examples"] == {"train": 32, "validation": 32}
    plan = PruningPlan.load(out / "pruning_plan.json")
    reloaded = AutoModelForSequenceClassification.from_pretrained(out)
    assert reloaded.config.pruned_heads == plan.heads and reloaded.config.id2label == {0: "no", 1: "yes"}
    assert [len(heads) for heads in Sensitivity.load(out / "sensitivity.safetensors").heads] == [4, 4]
    assert (out / "head_sensitivity.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text()
    assert results["model"] == "model" and str(tmp_path) not in card
    assert "with 4 of 8 attention heads and 48 feed-forward neurons left" in card and "| recovered | " in card
    assert "base_model" not in card  # A folder is no name on the Hub.
    assert "recovered" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert page.count("<polyline") == 2 and str(tmp_path) not in page
    assert "4 of 8 heads and 0 of 48 neurons are gone" in page


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_flags_in_a_file(tmp_path, model_dir, ending):
    files = own_files(tmp_path)
    values = {"model_name_or_path": str(model_dir), "output_dir": str(tmp_path / "out"), "use_cpu": True}
    values |= {"train_file": files[1], "validation_file": files[3], "num_train_epochs": 1, "disable_tqdm": True}
    file = tmp_path / f"flags.{ending}"
    values |= {"report_to": ["none"], "min_heads": None}
    file.write_text(json.dumps({**values, "ratio": 0.5, "budget": "heads"})[:-1] + ', "learning_rate": 5e-5}')
    results = main([str(file)])
    assert results["heads"] == {"dense": 8, "pruned": 4} and results["training"]["per_device_train_batch_size"] == 32
    assert results["training"]["learning_rate"] == 5e-5  # A text, for YAML.
    file.write_text("just text")
    with pytest.raises(ValueError, match="has no flags"):
        main([str(file)])
    file.write_text(json.dumps({**values, "ratios": 0.5}))
    with pytest.raises(ValueError, match="ratios"):
        main([str(file)])


def test_regression_from_json(tmp_path, model_dir):
    lines = [json.dumps({"text": text, "label": float(len(text))}) for text, _ in ROWS]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    files = ["--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "validation.jsonl")]
    results = main(flags(tmp_path, model_dir, *files, "--method", "gradient"))
    assert {"pearson", "spearmanr"} <= set(results["metrics"]["recovered"])


def test_parquet_files_without_names_of_labels(tmp_path):
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        Dataset.from_dict({"sentence": ["a"], "label": [1]}).to_parquet(tmp_path / "sst2" / f"{split}.parquet")
    with pytest.raises(ValueError, match="'sst2' are int64 without names. Write the files with `datasets`"):
        tasks.load_task("sst2", str(tmp_path))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--task_name", "mrpc", "--data_dir", "nowhere"], "lacks nowhere/mrpc/train.parquet"),
        (["--task_name", "squad"], "Unknown task 'squad'; choose one of cola"),
        (["--data_dir", "nowhere"], "--data_dir needs --task_name"),
        (["--train_file", "a.csv"], "together"),
        (["--train_file", "a.csv", "--validation_file", "b.csv"], "There is no file 'a.csv'"),
        (["--train_file", "a.csv", "--validation_file", "b.csv", "--task_name", "cola"], "not both"),
        (["--ratio", "1.5"], "`ratio`"),
        (["--method", "magic"], "Unknown sensitivity method"),
    ],
)
def test_wrong_flags(tmp_path, model_dir, more, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(flags(tmp_path, model_dir, *more))
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(ValueError, match="one number or word a row is needed"):
        tasks.load_task(train_file=str(file), validation_file=str(file))


def test_a_pruned_model_is_refused_at_once(tmp_path, model_dir):
    model = make_model(vocab_size=40).float()
    model.prune_heads({0: [1]})
    model.save_pretrained(model_dir)
    with pytest.raises(ValueError, match="is pruned already"):
        main(flags(tmp_path, model_dir, *own_files(tmp_path)))


def test_precision_of_latencies_after_a_resumption(tmp_path, model_dir, monkeypatch):
    command = flags(tmp_path, model_dir, *own_files(tmp_path), "--bf16", "True", "--max_examples", "8")
    found = []

    def measured(models, inputs):
        for model in models.values():
            dense = model.base_model.encoder.layer[0].attention.output.dense
            dense.register_forward_hook(lambda module, given, output: found.append(output.dtype))
            model(**inputs)
        return dict.fromkeys(models, 1.0)

    monkeypatch.setattr(run_glue_hap, "compare_latency", measured)
    with monkeypatch.context() as broken:
        broken.setattr(HapTrainer, "estimate_sensitivity", lambda self: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            main(command)
    main(command)
    assert found == [torch.bfloat16, torch.bfloat16]  # Of the dense model and of the pruned one.


def test_validation_with_an_unseen_label(tmp_path):
    files = [write_csv(tmp_path / "t.csv", ROWS), write_csv(tmp_path / "v.csv", [("good", "maybe")])]
    with pytest.raises(ValueError, match=r"lacks: \['maybe'\]"):
        tasks.load_task(train_file=files[0], validation_file=files[1])


def test_unsupported_model_is_refused_before_training(tmp_path, model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    shutil.copytree(model_dir, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "model_type": "ernie"}))
    with pytest.raises(ValueError, match="'ernie'"):
        main(flags(tmp_path, tmp_path / "other", *own_files(tmp_path)))


def test_demo_file_with_another_checksum(tmp_path):
    (tmp_path / "wrong.tar.gz").write_bytes(b"wrong")
    with pytest.raises(ValueError, match="SHA-256.*expected 5d7c06e0"):
        load_demo_dataset(tmp_path / "wrong.tar.gz")


def test_demo_dataset():
    data = load_demo_dataset()
    sizes = {split: len(rows) for split, rows in data.items()}
    assert sizes["validation"] == round(0.1 * sum(sizes.values())) and sum(sizes.values()) <= 10605
    assert not set(data["train"]["idx"]) & set(data["validation"]["idx"])
    first = dict(zip(data["train"]["idx"], data["train"]["label"], strict=True))
    first.update(zip(data["validation"]["idx"], data["validation"]["label"], strict=True))
    assert (first[1], first[2], first[3]) == (1, 1, 0)


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
