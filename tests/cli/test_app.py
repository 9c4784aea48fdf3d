"""The `hap` command, from scores to a pruned model that loads."""

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import transformers
from script_inputs import ROWS, write_csv
from tiny import ROOT, make_model
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hap_transformers import METHODS, PruningPlan, Sensitivity, apply_plan
from hap_transformers.cli import app
from hap_transformers.components.groups import find_groups
from hap_transformers.data.tasks import load_task
from hap_transformers.efficiency import count_flops, example_inputs
from hap_transformers.forward_modes import device_name


@pytest.fixture
def fine_tuned(tmp_path, model_dir):
    """A classifier with its tokenizer, and a file to score it on."""
    folder = tmp_path / "classifier"
    make_model(vocab_size=40, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder, write_csv(tmp_path / "train.csv", ROWS)


def hap(*arguments):
    """What a command prints as JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_from_scores_to_a_pruned_model(tmp_path, fine_tuned):
    model, train = fine_tuned
    scores, plan, out = tmp_path / "scores", tmp_path / "plan.json", tmp_path / "out"
    printed = hap("score", model, "--train-file", train, "--max-examples", 12, "--length", 8, "--output", scores)
    found = Sensitivity.load(scores)
    assert printed == {"method": "kronecker", "examples": 12, "reliability": found.reliability, "file": str(scores)}
    printed = hap("plan", scores, "--ratio", "0.5", "--output", plan)  # The file knows the model.
    made = PruningPlan.load(plan)
    assert printed["promise"] == made.promise and printed["removed"]["heads"] == made.count("heads")
    printed = hap("prune", model, "--plan", plan, "--output", out, "--train-file", train, "--length", 8)
    pruned = AutoModelForSequenceClassification.from_pretrained(out)
    assert printed["refitted"] and printed["parameters"]["pruned"] == sum(p.numel() for p in pruned.parameters())
    assert printed["parameters"]["pruned"] == made.promise["parameters"]
    assert AutoTokenizer.from_pretrained(out)("good film")["input_ids"]
    info = hap("info", out, "--length", 8)
    assert sum(info["heads"]) == 8 - made.count("heads") and info["dense_heads"] == [4, 4]
    assert info["flops"] == count_flops(pruned, example_inputs(pruned, 1, 8))
    bench = hap("bench", model, out, "--batch", 2, "--length", 8, "--repeats", 2)
    assert bench["parameters"] == printed["parameters"] and bench["flops"]["pruned"] < bench["flops"]["dense"]
    assert min(bench["milliseconds"].values()) > 0


def test_without_data_nothing_is_refitted(tmp_path, fine_tuned):
    model, _ = fine_tuned
    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    PruningPlan.for_model(loaded, heads={0: [1]}).save(tmp_path / "plan.json")
    assert not hap("prune", model, "--plan", tmp_path / "plan.json", "--output", tmp_path / "out")["refitted"]
    apply_plan(loaded, PruningPlan.load(tmp_path / "plan.json"))
    pruned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), pruned.parameters(), strict=True))


def test_tables_for_people(fine_tuned):
    model, _ = fine_tuned
    result = CliRunner().invoke(app, ["info", str(model), "--length", "8"])
    assert result.exit_code == 0 and "BertForSequenceClassification: " in result.stdout
    assert [line.split()[:4] for line in result.stdout.splitlines()[-2:]] == [
        ["0", "4", "of", "4"],
        ["1", "4", "of", "4"],
    ]


def test_a_budget_that_is_met_already_is_reported(tmp_path, fine_tuned):
    model, train = fine_tuned
    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    apply_plan(
        loaded, PruningPlan.for_model(loaded, heads={0: [0, 1], 1: [0, 1]}, neurons={0: range(12), 1: range(12)})
    )
    loaded.save_pretrained(model)
    scores, plan = tmp_path / "scores", tmp_path / "plan.json"
    hap("score", model, "--train-file", train, "--max-examples", 12, "--length", 8, "--output", scores)
    printed = CliRunner().invoke(app, ["plan", str(scores), "--ratio", "0.3", "--output", str(plan)])
    assert printed.exit_code == 0 and "Nothing to remove: the model meets params 30% already" in printed.stdout
    assert len(printed.stdout.splitlines()) == 1  # No empty table.
    assert PruningPlan.load(plan).count("heads") == 0
    out = tmp_path / "out"
    command = ["prune", str(model), "--plan", str(plan), "--output", str(out), "--train-file", str(train)]
    assert "The plan removes nothing; the model was copied" in CliRunner().invoke(app, command).stdout
    before, after = (AutoModelForSequenceClassification.from_pretrained(folder) for folder in (model, out))
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_what_will_be_left_is_reported(tmp_path, fine_tuned):
    model, train = fine_tuned
    scores, plan, out = tmp_path / "scores", tmp_path / "plan.json", tmp_path / "small"
    hap("score", model, "--train-file", train, "--max-examples", 12, "--length", 8, "--output", scores)
    printed = CliRunner().invoke(app, ["plan", str(scores), "--ratio", "0.5", "--output", str(plan)]).stdout
    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (loaded, loaded.bert.encoder)]
    apply_plan(loaded, PruningPlan.load(plan))
    left = [sum(p.numel() for p in module.parameters()) for module in (loaded, loaded.bert.encoder)]
    assert left[1] <= sizes[1] / 2
    assert (
        f"{left[0]:,} of {sizes[0]:,} parameters will be left, {left[1]:,} of {sizes[1]:,} in the encoder" in printed
    )
    loaded.save_pretrained(out)
    printed = CliRunner().invoke(app, ["bench", str(model), str(out), "--length", "8", "--repeats", "1"]).stdout
    assert printed.splitlines()[1].split() == ["classifier", "small", "left"]


def test_bench_over_batches_and_modes(tmp_path, fine_tuned, monkeypatch):
    """A row a batch and mode, in the order in which they were asked for; a clock that knows both."""
    model, _ = fine_tuned
    small, asked = tmp_path / "small", []
    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    apply_plan(loaded, PruningPlan.for_model(loaded, heads={0: [1]}))
    loaded.save_pretrained(small)

    def measured(models, inputs, repeats, *, mode, precision, progress):
        asked.append((*inputs["input_ids"].shape, mode, precision, repeats))
        return {"dense": len(inputs["input_ids"]) / 1000, "pruned": (0.5 if mode == "eager" else 0.25) / 1000}

    monkeypatch.setattr(sys.modules["hap_transformers.cli.bench"], "compare_latency", measured)
    command = ["bench", model, small, "--length", 8, "--batch", 1, "--batch", 4, "--precision", "bf16"]
    command += ["--mode", "eager", "--mode", "compiled", "--repeats", 3]
    found = hap(*command)
    ways = [(1, "eager"), (1, "compiled"), (4, "eager"), (4, "compiled")]
    assert asked == [(batch, 8, mode, "bf16", 3) for batch, mode in ways]
    assert [(run["batch"], run["mode"]) for run in found["runs"]] == ways
    assert found["runs"][3]["milliseconds"] == {"dense": 4.0, "pruned": 0.25}
    assert found["runs"][2]["flops"]["dense"] == 4 * found["runs"][0]["flops"]["dense"]
    printed = CliRunner().invoke(app, [*map(str, command)]).stdout.splitlines()
    assert "batches of 8 tokens" in printed[0] and printed[1].split() == [
        "batch",
        "mode",
        "classifier",
        "small",
        "left",
    ]
    assert printed[-1].split() == ["4", "compiled,", "ms", "4.0", "0.25", "6.2%"] and len(printed) == 7
    for mode, message in (("fast", "Unknown latency mode 'fast'"), ("cuda_graphs", "needs a CUDA device")):
        with pytest.raises(ValueError, match=message):
            hap("bench", model, small, "--device", "cpu", "--mode", mode)


@pytest.mark.parametrize("pruned, warned", [(1.0, True), (0.96, True), (0.95, False), (0.4, False)])
def test_a_plan_that_saves_no_time_is_warned_of(tmp_path, fine_tuned, monkeypatch, pruned, warned):
    model, _ = fine_tuned
    scores, plan, timed = tmp_path / "scores", tmp_path / "plan.json", []

    def measured(models, inputs, *, mode, precision):
        heads = [sum(group.num_components for group in find_groups(m, ["heads"])) for m in models.values()]
        timed.append((*heads, *inputs["input_ids"].shape))
        return {"dense": 1.0, "pruned": pruned}

    monkeypatch.setattr(sys.modules["hap_transformers.cli.plan"], "compare_latency", measured)
    hap("score", model, "--method", "magnitude", "--output", scores)
    command = ["plan", str(scores), "--ratio", "0.5", "--length", "8", "--output", str(plan)]
    printed = CliRunner().invoke(app, command)
    warning = f"is not faster on {device_name(torch.device('cpu'))}, eager: a batch of 1 x 8 takes {pruned:.0%} of"
    assert (warning in printed.stderr) == ("--budget latency" in printed.stderr) == warned
    assert timed == [(8, 8 - PruningPlan.load(plan).count("heads"), 1, 8)]
    assert hap(*command)["milliseconds"] == {"dense": 1000.0, "pruned": 1000 * pruned}
    assert "milliseconds" not in hap(*command, "--no-check-latency") and len(timed) == 2
    planned = hap(*command, "--budget", "latency", "--min-heads", 0, "--min-neurons", 0)
    assert planned["promise"]["latency"] > 0 and len(timed) == 2  # It promises a latency itself.


def test_a_plan_whose_latency_cannot_be_checked_is_made(tmp_path, fine_tuned, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory for two models")

    monkeypatch.setattr(sys.modules["hap_transformers.cli.plan"], "compare_latency", full)
    scores, plan = tmp_path / "scores", tmp_path / "plan.json"
    hap("score", fine_tuned[0], "--method", "magnitude", "--output", scores)
    printed = CliRunner().invoke(app, ["plan", str(scores), "--ratio", "0.5", "--output", str(plan)])
    assert printed.exit_code == 0 and "latency was not checked: no memory for two models" in printed.stderr
    assert PruningPlan.load(plan).count("heads")


@pytest.mark.reliability
def test_no_bars_where_there_is_no_terminal(tmp_path, fine_tuned):
    model, train = fine_tuned
    command = [Path(sys.executable).with_name("hap"), "score", model, "--train-file", train, "--max-examples", "12"]
    done = subprocess.run([*command, "--output", tmp_path / "s"], capture_output=True, text=True, check=True)
    assert "%|" not in done.stderr and "reliability" in done.stdout


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["info", "./nowhere"], 1, "hap: There is no folder './nowhere', nor a model"),
        (["info", __file__], 1, "test_app.py' is a file; name the folder of a model"),
        (["score", "MODEL"], 1, "hap: No data are named; pass --task"),
        (["score", "MODEL", "--task", "squad"], 1, "hap: Unknown task 'squad'"),
        (["plan", "nothing"], 1, "hap: No sensitivity file at 'nothing'"),
        (["prune", "MODEL", "--plan", "no.json", "--output", "out"], 1, "hap: No pruning plan at 'no.json'"),
        (["info"], 2, "Missing argument"),
    ],
)
def test_errors_in_one_line(fine_tuned, monkeypatch, capsys, arguments, code, message):
    from hap_transformers import cli

    model, _ = fine_tuned
    monkeypatch.setattr(sys, "argv", ["hap", *(str(model) if a == "MODEL" else a for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr().err
    assert ended.value.code == code and "Traceback" not in printed
    assert re.search(message, printed), printed
    if code == 1:
        assert printed.startswith("hap: ") and len(printed.splitlines()) == 1


def test_the_command_and_the_module_debug(monkeypatch):
    """Above, the installed command starts in a process of its own; here is what it and `python -m` run."""
    (command,) = entry_points(group="console_scripts", name="hap")
    monkeypatch.setattr(sys, "argv", ["hap", "--debug", "plan", "nothing"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # Typer sets its own.
    for start in (command.load(), lambda: runpy.run_module("hap_transformers.cli", run_name="__main__")):
        with pytest.raises(FileNotFoundError, match="No sensitivity file at 'nothing'"):
            start()


def test_a_model_for_another_task(fine_tuned):
    model, train = fine_tuned
    rows = [("good", "a"), ("bad", "b"), ("film", "c")]
    other = write_csv(Path(train).with_name("other.csv"), rows)
    assert load_task(train_file=other, validation_file=other).num_labels == 3
    with pytest.raises(ValueError, match=r"has 2 outputs, task 'custom' needs 3 \(a, b, c\)"):
        hap("score", model, "--train-file", other)
    config = AutoConfig.from_pretrained(model)
    config.problem_type = "multi_label_classification"
    config.save_pretrained(model)
    with pytest.raises(ValueError, match="is for multi_label_classification"):
        hap("score", model, "--train-file", train)


def test_labels_are_numbered_as_the_model_does(tmp_path, fine_tuned):
    """Scores of a model whose classes are in another order are those of one with the data's order and swapped rows."""
    model, train = fine_tuned
    scores = {}
    for names in (["no", "yes"], ["Yes", "No"]):
        config = AutoConfig.from_pretrained(model)
        config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        config.save_pretrained(model)
        if names[0] == "Yes":
            loaded = AutoModelForSequenceClassification.from_pretrained(model)
            for parameter in loaded.classifier.parameters():
                parameter.data = parameter.data.flip(0)
            loaded.save_pretrained(model)
        command = ["score", model, "--train-file", train, "--method", "gradient", "--output", tmp_path / "scores"]
        hap(*command)
        scores[names[0]] = Sensitivity.load(tmp_path / "scores")
    for first, second in zip(scores["no"].heads, scores["Yes"].heads, strict=True):
        assert torch.allclose(first, second, rtol=1e-4)


def test_a_folder_without_a_tokenizer(tmp_path, fine_tuned):
    """Transformers makes an empty one, to which all words are unknown."""
    model, train = fine_tuned
    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare' has no tokenizer .* processing_class=tokenizer"):
        hap("score", tmp_path / "bare", "--train-file", train, "--output", tmp_path / "scores")
    assert hap("score", tmp_path / "bare", "--method", "magnitude", "--output", tmp_path / "scores")["examples"] == 0
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    PruningPlan.for_model(loaded, heads={0: [1]}).save(plan)
    assert not hap("prune", tmp_path / "bare", "--plan", plan, "--output", out)["refitted"]
    assert not list(out.glob("*token*"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        hap("prune", tmp_path / "bare", "--plan", plan, "--output", tmp_path / "new", "--train-file", train)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_scores_classifiers_alone(tmp_path, fine_tuned, name):
    model, train = fine_tuned
    getattr(transformers, name)(AutoConfig.from_pretrained(model)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"is a {name}, not a model that was fine-tuned to classify"):
        hap("score", tmp_path / "other", "--train-file", train)


def test_the_device_is_chosen_and_reported(tmp_path, fine_tuned):
    model, train = fine_tuned
    command = ["score", str(model), "--train-file", train, "--device", "cpu", "--output", str(tmp_path / "scores")]
    assert "on 32 examples" in (printed := CliRunner().invoke(app, command).output) and "on cpu" in printed
    result = CliRunner().invoke(app, ["bench", str(model), str(model), "--device", "nowhere"])
    assert result.exit_code == 2 and "'nowhere'" in result.stderr


def test_scores_of_one_kind_alone(tmp_path, fine_tuned, monkeypatch):
    """A method that cannot score neurons fills no column for them."""
    monkeypatch.setitem(METHODS, "magnitude", dataclasses.replace(METHODS["magnitude"], kinds=("heads",)))
    command = ["score", str(fine_tuned[0]), "--method", "magnitude", "--output", str(tmp_path / "scores")]
    printed = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    assert printed.splitlines()[1].split("  ") == ["layer", "heads: lowest to highest score"]
    assert len(printed.splitlines()) == 4 and Sensitivity.load(tmp_path / "scores").neurons is None


def test_the_package_does_not_import_the_command():
    for file in (ROOT / "hap_transformers").rglob("*.py"):
        if file.parent.name != "cli":
            assert not re.search(r"^\s*(from|import) [\w.]*\bcli\b", file.read_text(), re.MULTILINE), file


WITHOUT_BATCHES = ["--method", "magnitude", "--ratio", 0.5, "--tuning-epochs", 0]


@pytest.fixture
def image_model(tmp_path):
    """The folder of a tiny image classifier with its processor."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    folder = tmp_path / "dense"
    transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    ).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def of_image_model(*words):
    """Runs a command, and returns what it printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_image_models_keep_their_processor_and_have_no_tokens(image_model, tmp_path):
    small = tmp_path / "small"
    of_image_model("prune", image_model, *WITHOUT_BATCHES, "--output", small)
    assert AutoImageProcessor.from_pretrained(small).size["height"] == 8
    output = of_image_model("bench", image_model, small, "--repeats", 1)
    assert "a batch of 8, medians of 1 passes" in output and "tokens" not in output
    output = of_image_model("bench", image_model, small, "--repeats", 1, "--batch", 1, "--batch", 2)
    assert "batches, medians of 1 passes" in output and "tokens" not in output


def test_a_processor_that_lacks_its_package_is_not_saved(image_model, tmp_path, monkeypatch):
    """The pruned model is, and the command says what is not."""

    def lacking(*args, **kwargs):
        raise ImportError("it needs pillow")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lacking)
    output = of_image_model("prune", image_model, *WITHOUT_BATCHES, "--output", tmp_path / "small")
    assert f"hap: The processor of '{image_model}' was not saved: it needs pillow" in output.replace("\n", " ")
    assert (tmp_path / "small" / "README.md").exists()
