"""A kind of component from outside the package is scored, planned, pruned, refitted, saved and reloaded."""

import copy
from pathlib import Path

import pairs
import pytest
import torch
from explicit import explicit_factors
from tiny import make_batch, make_batches, make_model
from transformers import AutoModelForSequenceClassification
from zoo import ZOO, logits, masked

from hap_transformers import (
    ARCHITECTURES,
    METHODS,
    Architecture,
    NeuronNames,
    PruningPlan,
    Sensitivity,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
)
from hap_transformers.components.groups import KINDS, find_groups, register_kind
from hap_transformers.sensitivity.surgeon import removal_costs


BOTH = ["heads", "pairs"]


@pytest.fixture
def registered(monkeypatch):
    """BERT has heads and pairs of neurons, and no single neurons."""
    register_kind(pairs.PAIRS)
    names = {
        "heads": ARCHITECTURES["bert"].names["heads"],
        "pairs": NeuronNames(("intermediate.dense",), "output.dense"),
    }
    monkeypatch.setitem(ARCHITECTURES, "bert", Architecture("encoder.layer", names))
    yield
    del KINDS["pairs"]


def neurons_of(removed):
    """The neurons of removed pairs."""
    return {layer: [neuron for pair in gone for neuron in (2 * pair, 2 * pair + 1)] for layer, gone in removed.items()}


def test_takes_few_lines():
    assert len(Path(pairs.__file__).read_text().splitlines()) < 40


@pytest.mark.parametrize("method", ["magnitude", "gauss_newton_trace", "hessian_trace"])
def test_scores_are_those_of_two_neurons(registered, monkeypatch, method):
    """A pair's trace, or squared norm, is the sum of its neurons'."""
    batches = [make_batch(8, seed=seed) for seed in range(3)]
    found = estimate_sensitivity(make_model(), batches, method, components=BOTH, progress=False)
    monkeypatch.undo()
    neurons = estimate_sensitivity(make_model(), batches, method, components=["heads", "neurons"], progress=False)
    torch.testing.assert_close(found.heads, neurons.heads)
    of_pairs, of_neurons = found.traces.get("pairs"), neurons.traces.get("neurons")
    if method == "magnitude":
        of_pairs, of_neurons = ([x.square() for x in layers] for layers in (found.scores["pairs"], neurons.neurons))
    for pair, neuron in zip(of_pairs, of_neurons, strict=True):
        torch.testing.assert_close(pair, neuron.unflatten(0, (-1, 2)).sum(1))


@pytest.mark.parametrize("method", METHODS)
def test_goes_all_the_way(registered, tmp_path, method):
    dense, batches = make_model(), [make_batch(8, seed=seed) for seed in range(3)]
    found = estimate_sensitivity(dense, batches, method, components=BOTH, progress=False)
    assert found.neurons is None and [len(scores) for scores in found.scores["pairs"]] == [12, 12]
    found.save(tmp_path / "scores")
    plan = plan_pruning(Sensitivity.load(tmp_path / "scores"), dense, ratio=0.5)
    plan.save(tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan.removed["pairs"] and plan.method == method

    model = copy.deepcopy(dense)
    apply_plan(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.promise["parameters"]
    left = [group.num_components for group in find_groups(model, ["pairs"])]
    assert all(count % 4 == 0 for count in left) and sum(left) == 24 - plan.count("pairs")
    expected = masked(dense, ZOO["bert"], plan.heads, neurons_of(plan.removed["pairs"]))
    torch.testing.assert_close(logits(model, ZOO["bert"]), logits(expected, ZOO["bert"]), rtol=0, atol=1e-10)

    before = distance(model, dense)
    reconstruct(model, dense, make_batches(ZOO["bert"]), progress=False)
    assert distance(model, dense) < before
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float64)
    again = copy.deepcopy(again)  # Some kernels sum otherwise where a file is mapped to unaligned memory.
    assert torch.equal(logits(again, ZOO["bert"]), logits(model, ZOO["bert"]))
    assert again.config.quantization_config["pairs"] == {
        str(layer): count for layer, count in enumerate(left) if plan.removed["pairs"].get(layer)
    }


def distance(model, dense):
    """How far the last layer's output lies from the dense model's."""
    batch = ZOO["bert"].batch(16)
    states = [one.bert(**batch).last_hidden_state[batch["attention_mask"].bool()] for one in (model, dense)]
    return (states[0] - states[1]).square().sum().item()


def test_pairs_are_priced_together(registered):
    """The costs equal those of removing two columns at a time from explicit factors."""
    model, batch = make_model(), make_batch(6)
    found = estimate_sensitivity(model, [batch], "kronecker", components=BOTH, progress=False)
    module = model.bert.encoder.layer[1].output.dense
    moment, cotangents = explicit_factors(model, batch, module)
    weight = module.weight.detach()
    order, costs = removal_costs(moment, weight.T @ cotangents @ weight, 2)
    assert torch.argsort(found.order["pairs"][1]).tolist() == order.tolist()
    torch.testing.assert_close(found.scores["pairs"][1][order], costs.cummax(0).values, rtol=1e-6, atol=1e-12)


def test_whole_blocks_can_go(registered):
    model = make_model()
    dense = copy.deepcopy(model)
    removed = {0: range(12), 1: [3]}
    apply_plan(model, PruningPlan.for_model(model, pairs=removed))
    expected = masked(dense, ZOO["bert"], {}, neurons_of(removed))
    torch.testing.assert_close(logits(model, ZOO["bert"]), logits(expected, ZOO["bert"]), rtol=0, atol=1e-10)
