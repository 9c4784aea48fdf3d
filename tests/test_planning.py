"""Plans: what goes, what it saves, and that both are exactly what surgery does."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import make_batch, make_model
from transformers import BertModel, BertPreTrainedModel
from zoo import HEADS, LAYERS, NEURONS, ZOO

from hap_transformers import (
    LatencyTable,
    PruningPlan,
    Sensitivity,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    prune_heads,
)
from hap_transformers.components.groups import attention_blocks, feed_forward_blocks
from hap_transformers.efficiency import count_flops, count_parameters


def scores(*layers):
    return Sensitivity("hessian_trace", [torch.tensor(layer, dtype=torch.float64) for layer in layers])


SCORES = scores([0.1, 0.9, 0.2, 0.8], [0.3, 0.05, 0.7, 0.4])


def random_scores(model, method="kronecker", seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: [torch.rand(block.num_components, generator=generator, dtype=torch.float64) for block in blocks]
        for name, blocks in (("heads", attention_blocks(model)), ("neurons", feed_forward_blocks(model)))
    }
    return Sensitivity(method, **layers)


def plan_heads(sensitivity, model, **arguments):
    return plan_pruning(sensitivity, model, **{"budget": "heads", "ratio": 0.5, **arguments})


def test_removes_the_lowest_of_the_whole_model():
    plan = plan_heads(SCORES, make_model())
    assert plan.heads == {0: [0, 2], 1: [0, 1]} and not plan.neurons
    assert plan.num_heads == 4 and plan.original_heads == [HEADS] * LAYERS


def test_floor_keeps_a_layer_alive():
    low_layer = scores([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    assert plan_heads(low_layer, make_model()).heads == {0: [0, 1, 2], 1: [0]}
    assert plan_heads(low_layer, make_model(), min_heads=0).heads == {0: [0, 1, 2, 3]}
    low_layer.method = "kronecker"
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


def encoder_parameters(model):
    return sum(p.numel() for p in model.bert.encoder.parameters())


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("method", ["kronecker", "gradient"])
def test_parameters_are_those_promised(ratio, method):
    """At least the share goes, and no more than one head or group of neurons of either kind beyond it."""
    model = make_model()
    dense, before = count_parameters(model), encoder_parameters(model)
    plan = plan_pruning(random_scores(model, method), model, ratio=ratio, min_heads=0, min_neurons=0)
    largest = max(attention_blocks(model)[0].weights_per_component(), 8 * (2 * 16 + 1))
    removed = plan.count_parameters(model)
    apply_plan(model, plan)
    assert count_parameters(model) == plan.promise["parameters"] == dense - removed
    assert ratio <= 1 - encoder_parameters(model) / before < ratio + 2 * largest / before
    assert all(block.num_components % 8 == 0 for block in feed_forward_blocks(model))
    again = plan_pruning(random_scores(model, method), model, ratio=ratio, min_heads=0, min_neurons=0)
    assert not again.heads and not again.neurons


def test_flops_are_those_promised(model_type):
    """Of a whole model on a batch, by `torch.utils.flop_counter`."""
    tiny = ZOO[model_type]
    model, batch = tiny.model(), tiny.batch()
    before = count_flops(model, batch)
    plan = plan_pruning(random_scores(model), model, budget="flops", ratio=0.5, inputs=batch, neuron_multiple=1)
    assert plan.heads or plan.neurons
    apply_plan(model, plan)
    assert count_flops(model, batch) == plan.promise["flops"] < before
    assert count_parameters(model) == plan.promise["parameters"]


def test_a_model_that_its_config_does_not_tell_all_of_can_be_pruned_again():
    """Without a pooler and with a head of one's own, by parameters and by FLOPs."""
    batch = {name: tensor for name, tensor in make_batch().items() if name != "labels"}
    for budget in ("params", "flops"):
        model = BertModel(make_model().config, add_pooling_layer=False).double()
        for ratio in (0.3, 0.6):
            plan = plan_pruning(random_scores(model), model, budget=budget, ratio=ratio, inputs=batch)
            assert plan.heads or plan.neurons
            apply_plan(model, plan)
            assert count_parameters(model) == plan.promise["parameters"]
            assert count_flops(model, batch) == plan.promise["flops"]


TABLE = LatencyTable("bert", [0, 2, 4], [0.0, 3.0, 4.0], [0, 24], [0.0, 12.0], 1.0, {"input_ids": [1, 8]})


def test_a_class_of_ones_own_can_be_planned_again():
    """Of Transformers' classes it has only a base that has no layers."""

    class OwnHead(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = BertModel(config, add_pooling_layer=False)
            self.post_init()

        def forward(self, **inputs):
            return self.bert(**inputs)

    model, whole = OwnHead(ZOO["bert"].config()), OwnHead(ZOO["bert"].config())
    apply_plan(model, plan_pruning(random_scores(model), model, ratio=0.3))
    plan = plan_pruning(random_scores(model), model, ratio=0.6)
    encoder, saved = count_parameters(whole.bert.encoder), count_parameters(whole) - plan.promise["parameters"]
    assert 0.6 * encoder <= saved < 0.8 * encoder


def test_latency_follows_the_table():
    model = make_model()
    sensitivity = random_scores(model)
    plan = plan_pruning(sensitivity, model, budget="latency", ratio=0.5, latency_table=TABLE, neuron_multiple=1)
    apply_plan(model, plan)
    heads = [block.num_components for block in attention_blocks(model)]
    neurons = [block.num_components for block in feed_forward_blocks(model)]
    expected = sum(np.interp(heads, [0, 2, 4], [0, 3, 4])) + sum(neurons) / 2
    assert plan.promise["latency"] == pytest.approx(expected + 1)
    assert 0.5 * 32 - 2 <= expected <= 0.5 * 32
    assert not plan_pruning(random_scores(model), model, budget="latency", ratio=0.5, latency_table=TABLE).heads


def test_measured_table(tmp_path):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    table = LatencyTable.measure(model, make_batch(), points=3, repeats=3, progress=False)
    assert table.head_counts == [0, 2, 4] and table.neuron_counts == [0, 12, 24] and table.head_seconds[0] == 0
    assert table.outside >= 0 and all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    (tmp_path / "table.json").write_text(json.dumps({**dataclasses.asdict(table), "head_counts": [0, 4, 2]}))
    with pytest.raises(ValueError, match="is not a latency table"):
        LatencyTable.load(tmp_path / "table.json")
    prune_heads(model, {0: [1]})
    with pytest.raises(ValueError, match="layers are alike"):
        LatencyTable.measure(model, make_batch(), progress=False)


def test_weighs_scores_against_costs():
    """A head has more weights than a neuron here; at equal scores it goes first only where cost counts."""
    model = make_model()
    equal = Sensitivity("kronecker", [torch.ones(HEADS)] * LAYERS, [torch.full((NEURONS,), 0.9)] * LAYERS)
    weighed = plan_pruning(equal, model, ratio=0.2, neuron_multiple=1)
    unweighed = plan_pruning(equal, model, ratio=0.2, neuron_multiple=1, weigh_costs=False)
    assert weighed.heads and not weighed.neurons and unweighed.neurons and not unweighed.heads


def test_the_order_of_removal_breaks_ties():
    model = make_model()
    sensitivity = Sensitivity("kronecker", [torch.ones(HEADS)] * LAYERS)
    sensitivity.head_order = [torch.tensor([3, 2, 1, 0]), torch.tensor([1, 0, 3, 2])]
    assert plan_heads(sensitivity, model).heads == {0: [0, 1, 2, 3]}
    assert plan_heads(sensitivity, model, ratio=0.25).heads == {0: [2, 3]}


def test_other_scores_share_out_between_heads_and_neurons():
    """Mask gradients of neurons lie far below the normalised ones of heads; the same share of either goes."""
    model = make_model()
    sensitivity = random_scores(model, "gradient")
    sensitivity.neurons = [layer / 1000 for layer in sensitivity.neurons]
    plan = plan_pruning(sensitivity, model, ratio=0.4, neuron_multiple=1)
    gone = sum(map(len, plan.neurons.values())) / (LAYERS * NEURONS)
    assert abs(plan.num_heads / (LAYERS * HEADS) - gone) < 0.15


@pytest.mark.parametrize("method", ["kronecker", "gauss_newton_trace"])
def test_does_not_depend_on_the_order_in_the_model(method):
    """The same model with its heads and neurons in another order loses the same of them."""
    model, moved = make_model(), make_model()
    generator = torch.Generator().manual_seed(1)
    orders = {"heads": [], "neurons": []}
    for kind, blocks in (("heads", attention_blocks(moved)), ("neurons", feed_forward_blocks(moved))):
        for block in blocks:
            orders[kind].append(torch.randperm(block.num_components, generator=generator))
            for projection in block.inputs:
                for p in projection.parameters:
                    rows = p.data.unflatten(0, (block.num_components, -1))
                    p.data = rows[orders[kind][-1]].flatten(0, 1)
            columns = block.output.module.weight.data.unflatten(1, (block.num_components, -1))
            block.output.module.weight.data = columns[:, orders[kind][-1]].flatten(1, 2)
    batch = make_batch(12)
    torch.testing.assert_close(moved(**batch).logits, model(**batch).logits)
    plans = [
        plan_pruning(
            estimate_sensitivity(m, [batch], method, progress=False), m, ratio=0.5, neuron_multiple=1, min_heads=0
        )
        for m in (model, moved)
    ]
    for kind, order in orders.items():
        found = {layer: sorted(order[layer][own].tolist()) for layer, own in getattr(plans[1], kind).items()}
        assert found == getattr(plans[0], kind) and found


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
        ({"ratio": 0.9}, "with min_heads=1 .* at most 0.75 can go"),
        ({"budget": "params", "sensitivity": random_scores(make_model()), "ratio": 0.99}, "at most 0.9.. can go"),
        ({"budget": "flops", "sensitivity": random_scores(make_model())}, "pass a batch as `inputs`"),
        ({"budget": "latency", "sensitivity": random_scores(make_model())}, "pass latency_table"),
        ({"latency_table": dataclasses.replace(TABLE, head_counts=[0, 2, 8])}, "Measure this model, dense"),
        ({"budget": "params"}, "no scores of neurons"),
        ({"sensitivity": scores([1.0], [1.0])}, "Estimate the sensitivity of this model"),
        (
            {"sensitivity": scores([1.0] * 4, [1.0, float("nan"), 1.0, 1.0])},
            "Layer 1 has scores of heads that are not",
        ),
        ({"sensitivity": Sensitivity("random", neurons=[torch.ones(24)] * LAYERS)}, "no scores of heads"),
    ],
    ids=str,
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_heads(**{"sensitivity": SCORES, "model": make_model(), **arguments})


def test_save_and_load(tmp_path):
    plan = plan_heads(SCORES, make_model())
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert '"0": [ 0, 2 ]' in (tmp_path / "plan.json").read_text()


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
        ({"neurons": {0: [1]}, "implants": {0: 2}}, "implants rank 2 in layer 0, where it removes 1"),
        ({"implants": {1: 1}}, "implants rank 1 in layer 1, where it removes 0"),
        ({"promise": {"parameters": 1}}, "promises 1 parameters"),
    ],
)
def test_validate(change, message):
    plan = dataclasses.replace(plan_heads(SCORES, make_model()), **change)
    with pytest.raises(ValueError, match=message):
        plan.validate(make_model())
