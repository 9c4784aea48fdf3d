"""The main job on small inputs, and its answers to wrong ones."""

import json
import shutil
import sys

import pytest
import torch
from script_inputs import ROWS, WORDS, flags, own_files, write_csv
from tiny import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from glue_scripts.run_glue_hap import defaults_for, main, run
from hap_transformers import HapTrainer, PruningPlan, Sensitivity
from hap_transformers.data.task_metrics import TaskMetrics


def test_own_csv_end_to_end(tmp_path, model_dir, capsys, drawn):
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
    assert results["components"]["heads"] == {"dense": 8, "pruned": 4}
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
    assert (
        results["components"]["heads"] == {"dense": 8, "pruned": 4}
        and results["training"]["per_device_train_batch_size"] == 32
    )
    assert results["training"]["learning_rate"] == 5e-5  # A text, for YAML.
    file.write_text("just text")
    with pytest.raises(ValueError, match="has no flags"):
        main([str(file)])
    for spoiled in (b"a: [", b"caf\xe9: 1"):
        file.write_bytes(spoiled)
        with pytest.raises(ValueError, match=f"flags.{ending}' cannot be read"):
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


@pytest.mark.slow
def test_a_killed_run_of_the_whole_model_goes_on(tmp_path, model_dir, monkeypatch):
    """With a trimmed vocabulary, and embeddings in a basis of their own: both are kept with the dense model."""
    settings = [*own_files(tmp_path), "--max_examples", "16", "--budget", "model", "--ratio", "0.3"]
    settings += ["--trim_vocabulary", "True", "--components", "embedding_dims", "neurons"]
    whole = main(flags(tmp_path, model_dir, *settings))
    (tmp_path / "out").rename(tmp_path / "whole")
    with monkeypatch.context() as broken:
        broken.setattr(HapTrainer, "prune", lambda self, plan: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            main(flags(tmp_path, model_dir, *settings))
    results = main(flags(tmp_path, model_dir, *settings))
    assert results["metrics"] == whole["metrics"] and results["parts"] == whole["parts"]
    models = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("whole", "out")]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert models[1].config.vocab_size == len(tokenizer) == 35  # Of 40 rows; all of the tokens are characters or used.
    assert sum(results["parts"]["pruned"].values()) == results["parameters"]["pruned"]
    assert results["parameters"]["pruned"] <= 0.7 * results["parameters"]["dense"]


@pytest.mark.slow
def test_a_run_killed_after_scoring_goes_on_in_the_same_basis(tmp_path, model_dir, monkeypatch, capsys):
    """With dimensions of heads, the default: scores are those of aligned heads, which are kept with them."""
    settings = [*own_files(tmp_path), "--max_examples", "16", "--per_device_train_batch_size", "8"]
    whole = main(flags(tmp_path, model_dir, *settings))
    (tmp_path / "out").rename(tmp_path / "whole")
    with monkeypatch.context() as broken:
        broken.setattr(HapTrainer, "prune", lambda self, plan: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            main(flags(tmp_path, model_dir, *settings))
    with monkeypatch.context() as broken:
        broken.setattr(HapTrainer, "estimate_sensitivity", lambda self: pytest.fail("scored again"))
        results = main(flags(tmp_path, model_dir, *settings))
    assert results["metrics"] == whole["metrics"] and results["head_ranks"] == whole["head_ranks"]
    assert list(results["components"]) == ["query_key_dims", "value_dims", "neurons"]
    told = capsys.readouterr().out
    assert "2. score query/key dimensions, value dimensions and FFN neurons by kronecker" in told
    assert "  query_key_dims  value_dims  neurons  " in told
    plans = [PruningPlan.load(tmp_path / name / "pruning_plan.json") for name in ("whole", "out")]
    assert plans[0] == plans[1] and plans[0].basis
    models = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("whole", "out")]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Dimensions left in each head" in page and (tmp_path / "out" / "head_ranks.png").exists()


def test_unsupported_model_is_refused_before_training(tmp_path, model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    shutil.copytree(model_dir, tmp_path / "other")
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "model_type": "ernie"}))
    with pytest.raises(ValueError, match="'ernie'"):
        main(flags(tmp_path, tmp_path / "other", *own_files(tmp_path)))


def error_of(monkeypatch, *arguments):
    """The line that the script prints for users."""
    monkeypatch.setattr(sys, "argv", ["run_glue_hap.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run()
    line = ended.value.code
    assert line.startswith("run_glue_hap.py: ") and "\n" not in line
    return line


def fine_tuned(model_dir, names, **settings):
    """Makes the folder's encoder a classifier whose outputs have names; the first and the last know good from bad."""
    config = AutoConfig.from_pretrained(model_dir, num_labels=len(names), **settings)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, config=config)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with torch.no_grad():
        good, bad = (model.bert(**tokenizer(f"{word} film", return_tensors="pt"))[1][0] for word in ("good", "bad"))
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        model.classifier.weight[0], model.classifier.weight[-1] = good - bad, bad - good
        middle = (good + bad) @ (good - bad) / 2
        model.classifier.bias[0], model.classifier.bias[-1] = -middle, middle
    model.save_pretrained(model_dir)


BARELY = ["--num_train_epochs", "0.01", "--recovery_epochs", "0.01", "--learning_rate", "1e-9", "--max_examples", "8"]


@pytest.mark.parametrize("names", [("yes", "no"), ("YES", "No")])
def test_classes_in_another_order(tmp_path, model_dir, names):
    """The checkpoint knows the answers; swapped labels would make it always wrong."""
    fine_tuned(model_dir, names)
    rows = [("good film", "yes"), ("bad film", "no")] * 8
    for split in ("train", "validation"):
        write_csv(tmp_path / f"{split}.csv", rows)
    files = ["--train_file", str(tmp_path / "train.csv"), "--validation_file", str(tmp_path / "validation.csv")]
    results = main(flags(tmp_path, model_dir, *files, *BARELY))
    assert results["metrics"]["dense"]["accuracy"] == 1
    saved = AutoConfig.from_pretrained(tmp_path / "out")
    assert saved.id2label == dict(enumerate(names)) and saved.label2id == {name: i for i, name in enumerate(names)}


def test_another_number_of_classes(tmp_path, model_dir):
    fine_tuned(model_dir, ("good", "fair", "bad"))
    command = flags(tmp_path, model_dir, *own_files(tmp_path), *BARELY)
    with pytest.raises(ValueError, match=r"has 3 outputs \(good, fair, bad\), task 'custom' needs 2 \(no, yes\)"):
        main(command)
    results = main([*command, "--ignore_mismatched_sizes", "True"])
    saved = AutoConfig.from_pretrained(tmp_path / "out")
    assert saved.id2label == {0: "no", 1: "yes"} and 0 <= results["metrics"]["dense"]["accuracy"] <= 1


def test_a_head_for_another_task(tmp_path, model_dir, monkeypatch):
    """A tagger's head has the name of a classifier's, and other sizes."""
    make_tagger = AutoModelForTokenClassification.from_pretrained
    make_tagger(model_dir, num_labels=5).save_pretrained(model_dir)
    command = flags(tmp_path, model_dir, *own_files(tmp_path), *BARELY)
    line = error_of(monkeypatch, *command)
    assert str(model_dir) in line and "--ignore_mismatched_sizes" in line
    assert main([*command, "--ignore_mismatched_sizes", "True"])["metrics"]["dense"]


def test_a_checkpoint_for_several_labels_a_text(tmp_path, model_dir):
    fine_tuned(model_dir, ("no", "yes"), problem_type="multi_label_classification")
    results = main(flags(tmp_path, model_dir, *own_files(tmp_path), *BARELY))
    assert results["metrics"]["recovered"]["loss"] > 0
    assert AutoConfig.from_pretrained(tmp_path / "out").problem_type == "single_label_classification"


def test_long_texts_are_cut(tmp_path, model_dir, capsys):
    for split in ("train", "validation"):
        write_csv(tmp_path / f"{split}.csv", [(f"{text} " * 100, label) for text, label in ROWS])
    files = ["--train_file", str(tmp_path / "train.csv"), "--validation_file", str(tmp_path / "validation.csv")]
    limit = AutoConfig.from_pretrained(model_dir).max_position_embeddings
    results = main(flags(tmp_path, model_dir, *files, *BARELY))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Texts are cut")]
    assert line.startswith(f"Texts are cut to {limit} tokens, not 128: Bert") and results["batch"][1] == limit
    main(flags(tmp_path, model_dir, *files, *BARELY, "--max_seq_length", "6"))
    assert "Texts are cut" not in capsys.readouterr().out


def test_files_in_latin_1_beside_jsonl(tmp_path, model_dir, monkeypatch):
    train, validation = tmp_path / "train.csv", tmp_path / "validation.jsonl"
    train.write_text(
        "text,label\n" + "".join(f"{t} café,{i % 2}\n" for i, (t, _) in enumerate(ROWS)), encoding="latin-1"
    )
    validation.write_text("\n".join(json.dumps({"text": t, "label": str(i % 2)}) for i, (t, _) in enumerate(ROWS)))
    files = ["--train_file", str(train), "--validation_file", str(validation)]
    line = error_of(monkeypatch, *flags(tmp_path, model_dir, *files))
    assert "train.csv' is not UTF-8: byte 0xe9 in line 2. Pass its encoding, such as --encoding latin-1." in line
    results = main(flags(tmp_path, model_dir, *files, *BARELY, "--encoding", "latin-1"))
    assert results["num_examples"] == {"train": 32, "validation": 32}


def test_a_tokenizer_without_padding(tmp_path):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = make_model("gpt2", dtype=torch.float32)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "gpt2")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path / "gpt2")
    main(flags(tmp_path, tmp_path / "gpt2", *own_files(tmp_path), *BARELY, "--bf16", "False"))
    assert AutoConfig.from_pretrained(tmp_path / "out").pad_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<end>"


def test_a_metric_of_the_users_own(tmp_path, model_dir, capsys, monkeypatch):
    intervals = TaskMetrics.intervals  # A metric of the library takes milliseconds a resample.
    monkeypatch.setattr(TaskMetrics, "intervals", lambda self: intervals(self, resamples=20))
    script = tmp_path / "errors.py"
    script.write_text(
        "import datasets\n"
        "import evaluate\n"
        "class Errors(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({n: datasets.Value('int64') for n in ('predictions', 'references')})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'errors': sum(p != r for p, r in zip(predictions, references))}\n"
    )
    command = flags(tmp_path, model_dir, *own_files(tmp_path), *BARELY)
    results = main([*command, "--metric", str(script)])
    for phase, values in results["metrics"].items():
        low, high = results["intervals"][phase]["errors"]
        assert values["errors"] == round((1 - values["accuracy"]) * 32) and low <= values["errors"] <= high
        assert results["intervals"][phase].keys() == {"errors", "accuracy"}
    (header,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("latency ms")]
    assert header.split()[:3] == ["errors", "accuracy", "loss"]
    card, page = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))
    value = results["metrics"]["recovered"]["accuracy"]
    low, high = results["intervals"]["recovered"]["accuracy"]
    assert f"{value:.4f} ({low:.3f} to {high:.3f})" in card and f"({low:.3f} to {high:.3f})" in page
    with pytest.raises(ValueError, match="The metric 'nowhere.py' cannot be loaded"):
        main([*command, "--metric", "nowhere.py"])


@pytest.mark.parametrize("link", [False, True])
def test_the_output_folder_is_not_that_of_a_model(tmp_path, model_dir, link):
    output = tmp_path / "link" if link else model_dir
    if link:
        output.symlink_to(model_dir)
    before = {file.name: file.read_bytes() for file in model_dir.iterdir()}
    command = flags(tmp_path, model_dir, *own_files(tmp_path))
    with pytest.raises(ValueError, match="is the folder of the model"):
        main([*command, "--output_dir", str(output)])
    shutil.copytree(model_dir, tmp_path / "other")
    with pytest.raises(ValueError, match="other' holds a model that this script did not write"):
        main([*command, "--output_dir", str(tmp_path / "other")])
    assert {file.name: file.read_bytes() for file in model_dir.iterdir()} == before


def test_what_the_script_wrote_may_be_replaced(tmp_path, model_dir):
    command = flags(tmp_path, model_dir, *own_files(tmp_path))
    for _ in range(2):
        assert main([*command, *BARELY])["metrics"]["recovered"]


def test_only_the_demo_trains_less():
    task, demo = (defaults_for(command) for command in (["--task_name=mrpc"], ["--bf16", "False"]))
    assert defaults_for(["--train_file", "a.csv"]) == task
    assert (task["num_train_epochs"], task["recovery_epochs"]) == (2.0, 1.0)
    assert (demo["num_train_epochs"], demo["recovery_epochs"]) == (1.0, 0.5)
    assert demo.keys() - task.keys() == {"refit_examples"} and demo["refit_examples"] == 1024
