"""Options that are fields of a configuration: they are all there, with its words and defaults, and do what it says."""

from dataclasses import fields

import pytest
import torch
import typer
from tiny import ROOT, make_model, random_scores
from typer.testing import CliRunner

from hap_transformers import HapConfig, PlanningSettings, PruningPlan, plan_pruning
from hap_transformers.cli import app
from hap_transformers.components.groups import find_groups


def options(command):
    return {option.name: option for option in typer.main.get_command(app).commands[command].params}


@pytest.mark.parametrize("field", fields(PlanningSettings), ids=lambda field: field.name)
def test_hap_plan_has_every_planning_setting(field):
    option = options("plan")[field.name]
    assert option.opts == ["--" + field.name.replace("_", "-")]
    assert option.help == field.metadata["help"] and option.default == field.default


def test_flags_can_be_switched_off():
    assert options("plan")["weigh_costs"].secondary_opts == ["--no-weigh-costs"]


@pytest.mark.parametrize(
    "command, names",
    [("score", ["method", "num_probes", "max_examples", "tolerance"]), ("prune", ["max_examples"])],
)
def test_help_and_defaults_are_those_of_the_config(command, names):
    known = {field.name: field for field in fields(HapConfig)}
    for name in names:
        option = options(command)[name]
        assert option.help == known[name].metadata["help"] and option.default == known[name].default


@pytest.mark.parametrize("command", typer.main.get_command(app).commands)
def test_the_reference_has_the_help_of_every_option(command):
    section = (ROOT / "docs" / "api" / "cli.md").read_text().split(f"## `hap {command}`")[1].split("\n## ")[0]
    for option in options(command).values():
        assert option.help in section, option.name


@pytest.fixture
def scored(tmp_path):
    """A model in a folder, and scores of it in a file."""
    model = make_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    scores = random_scores(model)
    # Per parameter, heads and neurons cost the same, so that some of either go.
    heads, neurons = (find_groups(model, [kind])[0].parameters_per_component() for kind in ("heads", "neurons"))
    scores.scores["neurons"] = [values * neurons / heads for values in scores.neurons]
    scores.model = str(tmp_path / "model")
    scores.save(tmp_path / "scores")
    return model, scores


def hap_plan(tmp_path, *flags):
    command = ["plan", str(tmp_path / "scores"), "--ratio", "0.4", "--output", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(app, [*command, "--length", "8", *flags], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "flags, settings",
    [
        (["--no-weigh-costs"], {"weigh_costs": False}),
        (["--neuron-multiple", "1"], {"neuron_multiple": 1}),
        (["--min-heads", "3"], {"min_heads": 3}),
        (["--min-neurons", "0.9"], {"min_neurons": 0.9}),
        (["--implant-ratio", "0.5"], {"implant_ratio": 0.5}),
        (["--budget", "neurons"], {"budget": "neurons"}),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_planning_options_change_the_plan(tmp_path, scored, flags, settings):
    model, scores = scored
    made = hap_plan(tmp_path, *flags)
    assert made == plan_pruning(scores, model, ratio=0.4, **settings)
    assert made.removed != hap_plan(tmp_path).removed


def test_neurons_are_left_in_multiples(tmp_path, scored):
    counts = [len(removed) for removed in hap_plan(tmp_path, "--neuron-multiple", "6").neurons.values()]
    assert counts and all((24 - count) % 6 == 0 for count in counts)


def test_the_latency_mode_is_one_of_the_device(tmp_path, scored):
    for budget in ("latency", "params"):
        with pytest.raises(ValueError, match="'cuda_graphs' needs a CUDA device"):
            hap_plan(tmp_path, "--budget", budget, "--latency-mode", "cuda_graphs", "--device", "cpu")


def test_settings_out_of_range_are_refused(tmp_path, scored):
    with pytest.raises(ValueError, match="`ratio` is the share to remove"):
        hap_plan(tmp_path, "--ratio", "1.5")
