"""No command replaces what it reads, or what is no output of its own."""

import os
import re
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from script_inputs import ROWS, save_model, write_csv
from tiny import make_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hap_transformers import PruningPlan
from hap_transformers.cli import app


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a file to score it on, its scores and a plan."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = AutoTokenizer.from_pretrained(save_model(folder))
    model = make_model(vocab_size=40, dtype=torch.float32)
    for name in ("m", "small"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_csv(folder / "train.csv", ROWS)
    PruningPlan.for_model(model, heads={0: [1]}).save(folder / "plan.json")
    assert hap(folder, "score", "m", "--method", "magnitude", "--output", "scores").exit_code == 0
    return folder


@pytest.fixture
def here(tmp_path, made, monkeypatch):
    """A copy of them, as the working directory."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def hap(folder, *arguments):
    before = os.getcwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(app, [*map(str, arguments)])
    finally:
        os.chdir(before)


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["prune", "m", "--plan", "plan.json", "--output", "m"], "is the folder of the model"),
        (["prune", "m", "--plan", "plan.json", "--output", "./small/../m"], "is the folder of the model"),
        (["prune", "m", "--plan", "plan.json", "--output", "link"], "is the folder of the model"),
        (["prune", "link", "--plan", "plan.json", "--output", "m", "--overwrite"], "is the folder of the model"),
        (["prune", "m", "--plan", "plan.json", "--output", "small"], "'small' holds a model. .* --overwrite"),
        (["prune", "m", "--plan", "plan.json", "--output", "adapter"], "'adapter' holds a model"),
        (["prune", "m", "--plan", "plan.json", "--output", "plan.json"], "is a file; name a folder"),
        (["prune", "m", "--plan", "plan.json", "--output", "plan.json/o"], "cannot be written below '.*plan.json'"),
        (["score", "m", "--method", "magnitude", "--output", "m/model.safetensors"], "is no file of this kind"),
        (["score", "m", "--method", "magnitude", "--output", "m/config.json"], "is no file of this kind"),
        (["score", "m", "--method", "magnitude", "--output", "plan.json"], "is no file of this kind"),
        (["score", "m", "--method", "magnitude", "--output", "small"], "'small' is a folder"),
        (["score", "m", "--method", "magnitude", "--output", "no/s"], "There is no folder 'no'"),
        (["score", "m", "--train-file", "train.csv", "--output", "train.csv"], "is a file that this command reads"),
        (["score", "m", "--train-file", "train.csv", "--output", "s", "--state-file", "./s"], "are both 's'"),
        (
            ["score", "m", "--train-file", "train.csv", "--state-file", "m/model.safetensors"],
            "--state-file 'm/model.safetensors' exists and is no file of this kind; name another file",
        ),
        (["score", "m", "--train-file", "train.csv", "--state-file", "plan.json"], "--state-file .*name another file"),
        (["score", "m", "--train-file", "train.csv", "--state-file", "train.csv"], "--state-file .* command reads"),
        (["score", "m", "--train-file", "train.csv", "--task", "sst2"], "either --task or --train-file, not both"),
        (["score", "m", "--train-file", "train.csv", "--data-dir", "m"], "--data-dir needs --task"),
        (["score", "m", "--texts", "train.csv", "--output", "train.csv"], "is a file that this command reads"),
        (["score", "m", "--texts", "train.csv", "--task", "sst2"], "either --task or --texts, not both"),
        (["score", "m", "--texts", "train.csv", "--data-dir", "m"], "--data-dir needs --task"),
        (["score", "m", "--train-file", "train.csv", "--column", "a"], "--column is that of --texts"),
        (["score", "m", "--texts", "m/model.safetensors"], "is not UTF-8|is no text"),
        (["prune", "m", "--plan", "plan.json", "--output", "new", "--texts", "no.txt"], "There is no file 'no.txt'"),
        (["score", "m", "--task", "sst2", "--encoding", "latin-1"], "--encoding is that of --train-file"),
        (["prune", "m", "--plan", "plan.json", "--output", "run"], "'run' holds a plan or tokenizer. .* --overwrite"),
        (["prune", "m", "--plan", "plan.json", "--output", "words"], "'words' holds a plan or tokenizer"),
        (["plan", "scores", "--ratio", "0.3", "--output", "scores"], "is a file that this command reads"),
        (["plan", "scores", "--ratio", "0.3", "--output", "m/config.json"], "is no file of this kind"),
        (["plan", "scores", "--ratio", "0.3", "--output", "train.csv"], "is no file of this kind"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_before_any_work(here, arguments, message):
    (here / "link").symlink_to("m")
    for name in ("adapter", "run", "words"):
        (here / name).mkdir()
    shutil.copy("plan.json", "run/pruning_plan.json")
    shutil.copy("m/tokenizer.json", "words")
    (here / "adapter" / "adapter_config.json").write_text("{}")
    before = contents(here)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, (ValueError, OSError))
    assert re.search(message, str(result.exception)), result.exception
    assert contents(here) == before


def test_what_was_asked_for_is_replaced(here):
    command = ["prune", "m", "--plan", "plan.json", "--output", "small"]
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    assert AutoModelForSequenceClassification.from_pretrained("small").config.pruned_heads == {0: [1]}
    (here / "new").mkdir()
    assert CliRunner().invoke(app, [*command[:-1], "new"]).exit_code == 0
    for command in (
        ["score", "m", "--method", "magnitude", "--output", "scores"],
        ["plan", "scores", "--ratio", "0.3", "--output", "plan.json"],
        ["plan", "scores", "--ratio", "0.3", "--output", "/dev/null"],
    ):
        assert CliRunner().invoke(app, command).exit_code == 0, command


@pytest.mark.parametrize("command", ["prune", "align"])
def test_an_adapter_or_sentence_encoder_that_is_replaced_is_gone(here, command):
    adapter = get_peft_model(make_model(vocab_size=40), LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    adapter.save_pretrained("old")
    others = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
    for name in others:
        (here / "old" / name).write_text("[]")
    what = ["--plan", "plan.json"] if command == "prune" else ["--train-file", "train.csv"]
    for output in ("old", "new"):
        found = CliRunner().invoke(app, [command, "m", *what, "--output", output, "--overwrite"])
        assert found.exit_code == 0, found.exception
    old, new = (AutoModelForSequenceClassification.from_pretrained(folder).state_dict() for folder in ("old", "new"))
    assert old.keys() == new.keys()
    left = {file.name for file in (here / "old").iterdir()}
    assert not left & {"adapter_config.json", "adapter_model.safetensors", *others}


def test_the_page_replaces_no_input(here):
    results = here / "results.json"
    results.write_text("{}")
    shutil.copy("plan.json", "pruning_plan.json")
    shutil.copy("scores", "sensitivity.safetensors")
    for output, message in (("results.json", "reads"), ("m/config.json", "no file of this kind"), ("m", "a folder")):
        result = CliRunner().invoke(app, ["report", ".", "--output", output])
        assert message in str(result.exception)
    assert results.read_text() == "{}"
    (here / "report.html").write_text("my own page")
    assert "no file of this kind" in str(CliRunner().invoke(app, ["report", "."]).exception)


@pytest.mark.parametrize(
    "spoil, command, message",
    [
        ("m/model.safetensors", ["info", "m"], "'m' cannot be loaded as a BertForSequenceClassification: "),
        ("m/model.safetensors", ["bench", "small", "m"], "'m' cannot be loaded"),
        ("m/config.json", ["info", "m"], "m/config.json"),
        ("scores", ["plan", "scores", "--ratio", "0.3"], "'scores' is not a file written by Sensitivity.save"),
        ("plan.json", ["prune", "m", "--plan", "plan.json", "--output", "o"], "'plan.json' is not a pruning plan"),
        ("results.json", ["report", "."], "results.json' is not JSON"),
        (None, ["info", "here"], "here"),
    ],
)
def test_files_that_cannot_be_read_are_named(here, monkeypatch, capsys, spoil, command, message):
    from hap_transformers import cli

    (here / "here").mkdir()
    shutil.copy("plan.json", "pruning_plan.json")
    shutil.copy("scores", "sensitivity.safetensors")
    if spoil:
        (here / spoil).write_bytes(b"\x07\x00spoiled")
    monkeypatch.setattr("sys.argv", ["hap", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("hap: ")]
    assert message in line


def test_errors_without_words_name_their_type(monkeypatch, capsys):
    module = sys.modules["hap_transformers.cli.app"]  # The package has the app itself by this name.

    def failing(self):
        raise KeyError("heads")

    monkeypatch.setattr(type(app), "__call__", failing)
    with pytest.raises(SystemExit):
        module.main()
    assert capsys.readouterr().err == "hap: KeyError: 'heads'\n"


def test_the_same_model_twice_is_noise(here):
    printed = CliRunner().invoke(app, ["bench", "m", "./m", "--length", "8", "--repeats", "1"]).stdout
    assert "both are the same model" in printed
    printed = CliRunner().invoke(app, ["bench", "m", "small", "--length", "8", "--repeats", "1"]).stdout
    assert "same model" not in printed


def test_models_that_no_batch_compares(here):
    make_model("vit").float().save_pretrained(here / "vit")
    assert "take different inputs" in str(CliRunner().invoke(app, ["bench", "m", "vit"]).exception)
    make_model(vocab_size=20).float().save_pretrained(here / "few")
    for pair in (["m", "few"], ["few", "m"]):  # The batch has words that both know.
        assert CliRunner().invoke(app, ["bench", *pair, "--length", "8", "--repeats", "1"]).exit_code == 0
