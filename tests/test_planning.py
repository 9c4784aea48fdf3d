import dataclasses

import pytest
import torch
from conftest import make_model
from zoo import HEADS, LAYERS

from hap_transformers import PruningPlan, Sensitivity, plan_pruning, prune_heads


def scores(*layers):
    return Sensitivity("hessian_trace", [torch.tensor(layer, dtype=torch.float64) for layer in layers])


SCORES = scores([0.1, 0.9, 0.2, 0.8], [0.3, 0.05, 0.7, 0.4])


def test_removes_the_lowest_of_the_whole_model():
    plan = plan_pruning(SCORES, make_model(), ratio=0.5)
    assert plan.heads == {0: [0, 2], 1: [0, 1]}
    assert plan.num_heads == 4 and plan.original_heads == [HEADS] * LAYERS


def test_floor_keeps_a_layer_alive():
    low_layer = scores([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    assert plan_pruning(low_layer, make_model(), ratio=0.5).heads == {0: [0, 1, 2], 1: [0]}
    assert plan_pruning(low_layer, make_model(), ratio=0.5, min_heads=0).heads == {0: [0, 1, 2, 3]}


def test_ratio_is_of_the_original_model():
    model = make_model()
    prune_heads(model, {0: [0, 2]})
    plan = plan_pruning(scores([0.9, 0.8], [0.3, 0.05, 0.7, 0.4]), model, ratio=0.5)
    assert plan.heads == {1: [0, 1]}
    prune_heads(model, plan.heads)
    assert plan_pruning(scores([0.9, 0.8], [0.7, 0.4]), model, ratio=0.25).heads == {}


def test_numbers_are_the_original_ones_after_pruning():
    model = make_model()
    prune_heads(model, {0: [0]})
    plan = plan_pruning(scores([0.9, 0.01, 0.8], [1.0, 1.0, 1.0, 1.0]), model, ratio=0.25)
    assert plan.heads == {0: [2]}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ratio": 1.0}, r"`ratio`.*\[0, 1\)"),
        ({"ratio": -0.1}, r"`ratio`.*\[0, 1\)"),
        ({"ratio": float("nan")}, r"`ratio`.*\[0, 1\)"),
        ({"budget": "money"}, "Unknown budget 'money'"),
        ({"min_heads": -1}, "`min_heads`"),
        ({"ratio": 0.9}, "min_heads=1 lets only 6 of 8 go"),
        ({"sensitivity": scores([1.0], [1.0])}, "Estimate the sensitivity of this model"),
        ({"sensitivity": scores([1.0] * 4, [1.0, float("nan"), 1.0, 1.0])}, "Layer 1 has scores that are not finite"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_pruning(**{"sensitivity": SCORES, "model": make_model(), **arguments})


def test_save_and_load(tmp_path):
    plan = plan_pruning(SCORES, make_model(), ratio=0.5)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"heads": {"a": [1]}}', '{"heads": {}, "extra": 1}'])
def test_loading_something_else(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="is not a pruning plan"):
        PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "roberta"}, "The plan is for a 'roberta'"),
        ({"original_heads": [HEADS]}, "Make a plan for this model"),
        ({"heads": {0: [1, 1]}}, "twice"),
        ({"heads": {LAYERS: [0]}}, "layers 0 to 1"),
        ({"heads": {0: [HEADS]}}, "numbered 0 to 3"),
    ],
)
def test_validate(change, message):
    plan = dataclasses.replace(plan_pruning(SCORES, make_model(), ratio=0.5), **change)
    with pytest.raises(ValueError, match=message):
        plan.validate(make_model())


def test_scores_of_neurons_alone_are_refused():
    with pytest.raises(ValueError, match="no scores of heads"):
        plan_pruning(Sensitivity("random", neurons=[torch.ones(24)] * LAYERS), make_model())
