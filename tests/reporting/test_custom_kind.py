"""Cards, pages, plots and commands show a kind of component that the package does not know."""

import dataclasses
import json

import pytest
import torch
from components import pairs
from test_page import Cells
from tiny import make_model
from typer.testing import CliRunner

from hap_transformers import ARCHITECTURES, Architecture, NeuronNames, PruningPlan, Sensitivity, apply_plan
from hap_transformers.cli import app
from hap_transformers.components.groups import KINDS
from hap_transformers.reporting.card import make_model_card
from hap_transformers.reporting.hub import write_card
from hap_transformers.reporting.page import render_report
from hap_transformers.reporting.plots import plot_structure
from hap_transformers.reporting.wording import budget_in_words


pytestmark = pytest.mark.usefixtures("drawn")
RESULTS = {
    "task": "sst2",
    "model": "org/tiny",
    "metrics": {"dense": {"loss": 0.3}, "pruned": {"loss": 0.4}},
    "num_examples": {"validation": 100},
    "parameters": {"dense": 100, "pruned": 50},
    "batch": [1, 8],
    "seed": 0,
    "hap_config": {"ratio": 0.5, "budget": "pairs", "method": "magnitude"},
    "training": {},
    "seconds": {},
    "versions": {},
}


@pytest.fixture
def pruned(monkeypatch):
    """A BERT of heads and pairs of neurons, pruned, and the plan."""
    monkeypatch.setitem(KINDS, "pairs", pairs.PAIRS)
    names = {**ARCHITECTURES["bert"].names, "pairs": NeuronNames(("intermediate.dense",), "output.dense")}
    del names["neurons"]
    monkeypatch.setitem(ARCHITECTURES, "bert", Architecture("encoder.layer", names))
    model = make_model(dtype=torch.float32)
    plan = PruningPlan.for_model(model, heads={1: [0]}, pairs={0: [1, 2, 3, 4]}, budget="pairs", ratio=0.5, method="x")
    apply_plan(model, plan)
    return model, plan


def test_card_and_its_picture(tmp_path, pruned):
    model, plan = pruned
    text = str(make_model_card(model, plan=plan))
    assert "A model with 7 of 8 attention heads and 20 pairs of FFN neurons left." in text
    assert "| heads | 4 of 4 | 3 of 4 |\n| pairs | 8 | 12 |\n" in text and "neurons |" not in text
    assert "a share of 0.5 of all pairs of FFN neurons" in text
    write_card(model, tmp_path)
    assert (
        "![Attention heads and pairs of FFN neurons left in each layer](structure.png)"
        in (tmp_path / "README.md").read_text()
    )
    assert (tmp_path / "structure.png").stat().st_size


def test_page(pruned):
    _, plan = pruned
    scores = Sensitivity("magnitude", {"pairs": [torch.rand(12) for _ in range(2)]})
    text = render_report("run", RESULTS, plan, scores)
    assert "1 of 8 attention heads and 4 of 24 pairs of FFN neurons are gone" in text
    assert "50% of all pairs of FFN neurons" in text and "Sensitivity of" not in text
    rows = Cells(text).rows
    assert ["layer", "heads", "share", "pairs", "share"] in rows and ["0", "4 of 4", "", "8 of 12", ""] in rows


def test_page_without_the_kind(pruned, monkeypatch):
    """`hap report` runs where nobody registers it."""
    _, plan = pruned
    monkeypatch.delitem(KINDS, "pairs")
    assert "4 of 24 pairs are gone" in render_report("run", RESULTS, plan, Sensitivity("magnitude"))
    assert budget_in_words("pairs") == "pairs"


def test_the_map_is_of_the_first_scored_kind_with_numbers(pruned, monkeypatch):
    monkeypatch.setitem(KINDS, "pairs", dataclasses.replace(pairs.PAIRS, keeps_numbers=True))
    scores = Sensitivity("mine", {"pairs": [torch.tensor([1.0, 2.0])]}, in_loss_units=True)
    text = render_report("run", RESULTS, PruningPlan({"pairs": {0: [1]}}, "bert", {"pairs": [2]}), scores)
    assert "Sensitivity of pairs" in text and "removing one pair costs, in units of the training loss," in text
    details = [attributes["data-detail"] for _, attributes in Cells(text).tags if "data-detail" in attributes]
    assert details == ["layer 0, pair 0: 1, kept", "layer 0, pair 1: 2, removed"]


def test_commands(tmp_path, pruned):
    model, _ = pruned
    model.save_pretrained(tmp_path / "model")

    def hap(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(hap("info", tmp_path / "model", "--length", 8, "--json"))
    assert found["pairs"] == [8, 12] and "dense_pairs" not in found and found["dense_heads"] == [4, 4]
    assert hap("info", tmp_path / "model", "--length", 8).splitlines()[1].split() == [
        "layer",
        "heads",
        "pairs",
        "implant",
    ]
    command = ("score", tmp_path / "model", "--method", "magnitude", "--output", tmp_path / "scores")
    assert "pairs: lowest to highest score" in hap(*command)
    command = ("plan", tmp_path / "scores", "--ratio", 0.6, "--output", tmp_path / "plan.json")
    assert "pairs removed" in hap(*command) and json.loads(hap(*command, "--json"))["removed"]["pairs"] > 0


def test_structure_of_one_kind(tmp_path, monkeypatch):
    names = {"neurons": ARCHITECTURES["bert"].names["neurons"]}
    monkeypatch.setitem(ARCHITECTURES, "bert", Architecture("encoder.layer", names))
    plot_structure(make_model(), tmp_path / "structure.png")
    assert (tmp_path / "structure.png").stat().st_size
