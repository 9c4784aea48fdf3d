"""Whole layers on the command line."""

import json

import pytest
from encoders import TEXTS, save_encoder
from transformers import AutoModel
from typer.testing import CliRunner

from hap_transformers import PruningPlan, Sensitivity
from hap_transformers.cli import app


def hap(*arguments):
    """What a command prints as JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_whole_layers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    source = save_encoder(tmp_path, dense=True)
    options = ("--texts", "texts.txt", "--length", 12, "--tuning-epochs", 0)
    printed = hap("prune", source, *options, "--ratio", 0.5, "--components", "layers", "--output", "small")
    info, plan = hap("info", "small"), PruningPlan.load("small/pruning_plan.json")
    (layer,) = plan.heads
    assert info["heads"][layer] == info["neurons"][layer] == 0 and info["heads"].count(0) == 1
    scores = Sensitivity.load("small/sensitivity.safetensors").scores["layers"]
    assert [len(values) for values in scores] == [1, 1] and scores[layer] == min(scores)
    assert printed["parameters"]["pruned"] == info["parameters"] == plan.promise["parameters"]
    again = hap("prune", "small", *options, "--ratio", 0.7, "--output", "smaller")
    assert again["pruned_before"] and not printed["pruned_before"]
    assert again["parameters"]["pruned"] < printed["parameters"]["pruned"]
    command = ["prune", "small", "--plan", "plan.json", "--tuning-epochs", "0", "--output", "smallest"]
    PruningPlan.for_model(AutoModel.from_pretrained("small"), neurons={1 - layer: [0]}).save("plan.json")
    people = CliRunner().invoke(app, command, catch_exceptions=False)
    header = next(line for line in people.stdout.splitlines() if line.endswith("left"))
    assert header.split() == ["before", "pruned", "left"] and "hap: comparing with the model before" in people.stderr


def test_layers_that_must_stay_are_refused_before_scoring(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    monkeypatch.setattr("hap_transformers.cli.prune.make_scores", lambda *args: pytest.fail("It scored."))
    options = ("--texts", "texts.txt", "--components", "layers", "--uniform", "--ratio", 0.5, "--output", "small")
    with pytest.raises(ValueError, match="its layers normalize the residual stream"):
        hap("prune", save_encoder(tmp_path, dense=True), *options)
