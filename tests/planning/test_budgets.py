"""A plan promises exactly what surgery saves, in every measure."""

import pytest
from tiny import make_batch, make_model, random_scores
from transformers import BertModel, BertPreTrainedModel
from zoo import ZOO

from hap_transformers import apply_plan, plan_pruning
from hap_transformers.components.groups import find_groups
from hap_transformers.efficiency import count_flops, count_parameters


def encoder_parameters(model):
    return sum(p.numel() for p in model.bert.encoder.parameters())


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("method", ["kronecker", "gradient"])
def test_parameters_are_those_promised(ratio, method):
    """At least the share goes, and at most one head and one group of neurons more."""
    model = make_model()
    dense, before = count_parameters(model), encoder_parameters(model)
    plan = plan_pruning(random_scores(model, method), model, ratio=ratio, min_heads=0, min_neurons=0)
    largest = max(find_groups(model, ["heads"])[0].weights_per_component(), 8 * (2 * 16 + 1))
    removed = plan.count_parameters(model)
    apply_plan(model, plan)
    assert count_parameters(model) == plan.promise["parameters"] == dense - removed
    assert ratio <= 1 - encoder_parameters(model) / before < ratio + 2 * largest / before
    assert all(group.num_components % 8 == 0 for group in find_groups(model, ["neurons"]))
    again = plan_pruning(random_scores(model, method), model, ratio=ratio, min_heads=0, min_neurons=0)
    assert not again.heads and not again.neurons


def test_flops_are_those_promised(model_type):
    """`torch.utils.flop_counter` counts the same FLOPs for a whole model on a batch."""
    tiny = ZOO[model_type]
    model, batch = tiny.model(), tiny.batch()
    before = count_flops(model, batch)
    plan = plan_pruning(random_scores(model), model, budget="flops", ratio=0.5, inputs=batch, neuron_multiple=1)
    assert plan.heads or plan.neurons
    apply_plan(model, plan)
    assert count_flops(model, batch) == plan.promise["flops"] < before
    assert count_parameters(model) == plan.promise["parameters"]


def test_a_model_that_its_config_does_not_tell_all_of_can_be_pruned_again():
    """The model has no pooler, which its config does not record."""
    batch = {name: tensor for name, tensor in make_batch().items() if name != "labels"}
    for budget in ("params", "flops"):
        model = BertModel(make_model().config, add_pooling_layer=False).double()
        for ratio in (0.3, 0.6):
            plan = plan_pruning(random_scores(model), model, budget=budget, ratio=ratio, inputs=batch)
            assert plan.heads or plan.neurons
            apply_plan(model, plan)
            assert count_parameters(model) == plan.promise["parameters"]
            assert count_flops(model, batch) == plan.promise["flops"]


def test_a_class_of_ones_own_can_be_planned_again():
    """Its only base class in Transformers has no layers."""

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
