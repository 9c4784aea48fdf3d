"""The ranking of components, its floors, and wrong inputs."""

import pytest
import torch
from tiny import hand_made, make_batch, make_model, random_scores
from zoo import HEADS, LAYERS, NEURONS, ZOO

from hap_transformers import (
    estimate_sensitivity,
    plan_pruning,
    prune_heads,
)
from hap_transformers.components.groups import find_groups


def scores(*layers):
    return hand_made("hessian_trace", heads=[torch.tensor(layer, dtype=torch.float64) for layer in layers])


SCORES = scores([0.1, 0.9, 0.2, 0.8], [0.3, 0.05, 0.7, 0.4])


def plan_heads(sensitivity, model, **arguments):
    return plan_pruning(sensitivity, model, **{"budget": "heads", "ratio": 0.5, **arguments})


def test_removes_the_lowest_of_the_whole_model():
    plan = plan_heads(SCORES, make_model())
    assert plan.heads == {0: [0, 2], 1: [0, 1]} and not plan.neurons
    assert plan.count("heads") == 4 and plan.original["heads"] == [HEADS] * LAYERS


def test_floor_keeps_a_layer_alive():
    low_layer = scores([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    assert plan_heads(low_layer, make_model()).heads == {0: [0, 1, 2], 1: [0]}
    assert plan_heads(low_layer, make_model(), min_heads=0).heads == {0: [0, 1, 2, 3]}
    low_layer.foresees_refit = True
    assert plan_heads(low_layer, make_model()).heads == {0: [0, 1, 2, 3]}


def test_ratio_is_of_the_original_model():
    model = make_model()
    prune_heads(model, {0: [0, 2]})
    plan = plan_heads(scores([0.9, 0.8], [0.3, 0.05, 0.7, 0.4]), model)
    assert plan.heads == {1: [0, 1]}
    prune_heads(model, plan.heads)
    assert plan_heads(scores([0.9, 0.8], [0.7, 0.4]), model, ratio=0.25).heads == {}


def test_numbers_are_the_original_ones_after_pruning():
    model = make_model()
    prune_heads(model, {0: [0]})
    plan = plan_heads(scores([0.9, 0.01, 0.8], [1.0, 1.0, 1.0, 1.0]), model, ratio=0.25)
    assert plan.heads == {0: [2]}


def test_weighs_scores_against_costs():
    """A head has more weights than a neuron here. At equal scores it goes first only if costs count."""
    model = make_model()
    equal = hand_made("kronecker", heads=[torch.ones(HEADS)] * LAYERS, neurons=[torch.full((NEURONS,), 0.9)] * LAYERS)
    weighed = plan_pruning(equal, model, ratio=0.2, neuron_multiple=1)
    unweighed = plan_pruning(equal, model, ratio=0.2, neuron_multiple=1, weigh_costs=False)
    assert weighed.heads and not weighed.neurons and unweighed.neurons and not unweighed.heads


def test_the_order_of_removal_breaks_ties():
    model = make_model()
    sensitivity = hand_made("kronecker", heads=[torch.ones(HEADS)] * LAYERS)
    sensitivity.order["heads"] = [torch.tensor([3, 2, 1, 0]), torch.tensor([1, 0, 3, 2])]
    assert plan_heads(sensitivity, model).heads == {0: [0, 1, 2, 3]}
    assert plan_heads(sensitivity, model, ratio=0.25).heads == {0: [2, 3]}


def test_other_scores_share_out_between_heads_and_neurons():
    """Mask gradients of neurons are far smaller than the normalised ones of heads, yet the same share of each goes."""
    model = make_model()
    sensitivity = random_scores(model, "gradient")
    sensitivity.scores["neurons"] = [layer / 1000 for layer in sensitivity.neurons]
    plan = plan_pruning(sensitivity, model, ratio=0.4, neuron_multiple=1)
    gone = sum(map(len, plan.neurons.values())) / (LAYERS * NEURONS)
    assert abs(plan.count("heads") / (LAYERS * HEADS) - gone) < 0.15


@pytest.mark.parametrize("method", ["kronecker", "gauss_newton_trace"])
def test_does_not_depend_on_the_order_in_the_model(method):
    """A model with permuted heads and neurons loses the same ones."""
    model, moved = make_model(), make_model()
    generator = torch.Generator().manual_seed(1)
    orders = {"heads": [], "neurons": []}
    for group in find_groups(moved):
        order = torch.randperm(group.num_components, generator=generator)
        orders[group.kind.name].append(order)
        for projection in group.writers:
            for p in projection.parameters:
                p.data = p.data.unflatten(0, (group.num_components, -1))[order].flatten(0, 1)
        columns = group.reader.module.weight.data.unflatten(1, (group.num_components, -1))
        group.reader.module.weight.data = columns[:, order].flatten(1, 2)
    batch = make_batch(12)
    torch.testing.assert_close(moved(**batch).logits, model(**batch).logits)
    plans = [
        plan_pruning(
            estimate_sensitivity(m, [batch], method, progress=False), m, ratio=0.5, neuron_multiple=1, min_heads=0
        )
        for m in (model, moved)
    ]
    for kind, order in orders.items():
        found = {layer: sorted(order[layer][gone].tolist()) for layer, gone in plans[1].removed[kind].items()}
        assert found == plans[0].removed[kind] and found


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ratio": 1.0}, r"`ratio`.*\[0, 1\)"),
        ({"ratio": -0.1}, r"`ratio`.*\[0, 1\)"),
        ({"ratio": float("nan")}, r"`ratio`.*\[0, 1\)"),
        ({"budget": "money"}, "Unknown budget 'money'"),
        ({"min_heads": -1}, "`min_heads`"),
        ({"min_neurons": 1.0}, "`min_neurons`"),
        ({"implant_ratio": -0.5}, "`implant_ratio`"),
        ({"neuron_multiple": 0}, "`neuron_multiple`"),
        ({"ratio": 0.9}, "keeps at least 1 head.* at most 0.75 can go"),
        ({"budget": "params", "sensitivity": random_scores(make_model()), "ratio": 0.99}, "at most 0.9.. can go"),
        ({"budget": "flops", "sensitivity": random_scores(make_model())}, "pass a batch as `inputs`"),
        ({"budget": "latency", "sensitivity": random_scores(make_model())}, "pass latency_table"),
        (
            {"budget": "params", "min_heads": 0, "ratio": 0.7},
            "met: every layer keeps all neurons, so at most 0.5.* can go",
        ),
        ({"budget": "params"}, "keeps at least 1 heads and all neurons, so at most 0.41 can go"),
        ({"sensitivity": scores([1.0], [1.0])}, "Estimate the sensitivity of this model"),
        (
            {"sensitivity": scores([1.0] * 4, [1.0, float("nan"), 1.0, 1.0])},
            "Layer 1 has scores of heads that are not",
        ),
        ({"sensitivity": hand_made("random", neurons=[torch.ones(24)] * LAYERS)}, "no scores of heads"),
    ],
    ids=str,
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_heads(**{"sensitivity": SCORES, "model": make_model(), **arguments})


def test_scores_of_another_type_of_model_are_refused():
    bert, roberta = make_model(), ZOO["roberta"].model()
    sensitivity = estimate_sensitivity(bert, [], "magnitude", progress=False)
    with pytest.raises(ValueError, match="The scores are of a 'bert', but RobertaForSequenceClassification is a 'rob"):
        plan_pruning(sensitivity, roberta, ratio=0.5)
    sensitivity.model_type = ""  # As in files of earlier releases.
    assert plan_pruning(sensitivity, roberta, ratio=0.5).model_type == "roberta"


def test_multiples_that_are_in_the_way_are_named():
    """The floor is a twentieth, 2 of 24 neurons, but less than 16 of them cannot be left in multiples of 16."""
    model = make_model()
    sensitivity = hand_made("magnitude", neurons=[torch.arange(24.0)] * LAYERS)
    settings = {"budget": "neurons", "ratio": 0.5}
    message = "keeps at least 16 neurons.* at most 0.333 can go.*Lower the ratio, the floors or neuron_multiple"
    with pytest.raises(ValueError, match=message):
        plan_pruning(sensitivity, model, neuron_multiple=16, **settings)
    assert plan_pruning(sensitivity, model, **settings).count("neurons") == 24


def test_a_share_too_small_for_an_implant_is_warned_of(caplog):
    """Of 24 neurons a tenth is two, and eight go together."""
    model = make_model()
    sensitivity = hand_made("kronecker", neurons=[torch.arange(24.0)] * LAYERS)
    settings = {"budget": "neurons", "ratio": 0.5, "neuron_multiple": 8}
    assert plan_pruning(sensitivity, model, implant_ratio=0.5, **settings).implants and not caplog.records
    assert not plan_pruning(sensitivity, model, implant_ratio=0.1, **settings).implants
    assert "The plan has no implants: implant_ratio=0.1 of what goes is less than one" in caplog.text


def test_swapped_arguments_are_named():
    model = make_model()
    with pytest.raises(TypeError, match="`sensitivity` is a BertForSequenceClassification; give scores first"):
        plan_pruning(model, random_scores(model), ratio=0.5)
