"""The main job on small inputs, and its answers to wrong ones."""

import json
import shutil

import pytest
import torch
from script_inputs import ROWS, flags, own_files
from tiny import make_model
from transformers import AutoModelForSequenceClassification

from glue_scripts.run_glue_hap import main
from hap_transformers import HapTrainer, PruningPlan, Sensitivity


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
    assert "with 4 of 8 attention heads and 48 FFN neurons left" in card and "| recovered | " in card
    assert "base_model" not in card  # A folder is no name on the Hub.
    assert "recovered" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert page.count("<polyline") == 2 and str(tmp_path) not in page
    assert "4 of 8 attention heads and 0 of 48 FFN neurons are gone" in page


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

    monkeypatch.setattr("hap_transformers.reporting.results.compare_latency", measured)
    with monkeypatch.context() as broken:
        broken.setattr(HapTrainer, "estimate_sensitivity", lambda self: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            main(command)
    main(command)
    assert found == [torch.bfloat16, torch.bfloat16]  # Of the dense model and of the pruned one.


def test_unsupported_model_is_refused_before_training(tmp_path, model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    shutil.copytree(model_dir, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "model_type": "ernie"}))
    with pytest.raises(ValueError, match="'ernie'"):
        main(flags(tmp_path, tmp_path / "other", *own_files(tmp_path)))
