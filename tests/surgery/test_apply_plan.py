"""Removing heads and neurons equals masking them in the dense model."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import changed_plan, make_batch, make_model, untouched
from transformers import BertConfig, BertModel, CLIPConfig, CLIPForImageClassification
from zoo import ALL_HEADS, ALL_NEURONS, HEADS, LAYERS, NEURONS, ZOO, logits, masked_logits

from hap_transformers import PruningPlan, apply_plan, prune_heads
from hap_transformers.surgery.undo import undone_on_error


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


removals = st.tuples(
    st.dictionaries(st.integers(0, LAYERS - 1), st.sets(st.sampled_from(ALL_HEADS)).map(sorted)),
    st.dictionaries(
        st.integers(0, LAYERS - 1), st.one_of(st.just(ALL_NEURONS), st.sets(st.sampled_from(ALL_NEURONS)).map(sorted))
    ),
)


def check_plans(model_type, attention, first, second):
    """Applies two random plans in turn, the second to what the first left."""
    tiny = ZOO[model_type]
    model = tiny.model(attn_implementation=attention)
    dense = copy.deepcopy(model)
    gone_heads, left_neurons = {}, {layer: ALL_NEURONS for layer in range(LAYERS)}
    for heads, neurons in (first, second):
        neurons = {layer: [n for n in gone if n < len(left_neurons[layer])] for layer, gone in neurons.items()}
        plan = PruningPlan.for_model(model, heads=heads, neurons=neurons)
        before, promised = count(model), plan.count_parameters(model)
        apply_plan(model, plan)
        assert before - count(model) == promised
        for layer, numbers in heads.items():
            gone_heads[layer] = {*gone_heads.get(layer, ()), *numbers}
        for layer, numbers in neurons.items():
            left_neurons[layer] = [n for i, n in enumerate(left_neurons[layer]) if i not in numbers]
        gone_neurons = {layer: set(ALL_NEURONS) - set(left) for layer, left in left_neurons.items()}
        expected = masked_logits(dense, tiny, gone_heads, gone_neurons)
        torch.testing.assert_close(logits(model, tiny), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_removing_equals_masking(model_type, attention):
    tiny = ZOO[model_type]
    if attention == "sdpa" and not type(tiny.model())._supports_sdpa:
        pytest.skip(f"{model_type} has no sdpa attention in this release of Transformers")
    # The surgery is the same whichever kernel runs what is left.
    plans = {"eager": 8, "sdpa": 3}[attention]
    check = given(first=removals, second=removals)(check_plans)
    settings(max_examples=plans, deadline=None, derandomize=True)(check)(model_type, attention)


def test_every_head_and_neuron_matters(model_type):
    """Otherwise the comparison with masks would prove nothing."""
    tiny = ZOO[model_type]
    model = tiny.model()
    dense, batch = logits(model, tiny), tiny.batch(dtype=model.dtype)
    outputs = ((tiny.heads_out, HEADS), (tiny.neurons_out, NEURONS))
    for layer, (path, count) in itertools.product(range(LAYERS), outputs):

        def each_without_one(module, args, count=count):
            """The batch is there once for each component, which its inputs lack."""
            inputs = args[0].unflatten(0, (count, -1)).unflatten(-1, (count, -1)).clone()
            for component in range(count):
                inputs[component, ..., component, :] = 0
            return inputs.flatten(-2).flatten(0, 1)

        handle = model.get_submodule(f"{tiny.layer.format(layer)}.{path}").register_forward_pre_hook(each_without_one)
        found = model(**{name: torch.cat([value] * count) for name, value in batch.items()}).logits
        handle.remove()
        assert ((found.unflatten(0, (count, -1)) - dense).abs().flatten(1).amax(1) > 1e-8).all()


def test_old_contract(model_type):
    """Numbers are the dense model's, prunings accumulate, repeated heads are skipped."""
    tiny = ZOO[model_type]
    model, other = tiny.model(), tiny.model()
    model.prune_heads({0: [1]})
    model.prune_heads({0: [1, 2], 1: [3]})
    other.prune_heads({0: [2, 1], 1: [3]})
    assert model.config.pruned_heads == {0: [1, 2], 1: [3]}
    assert torch.equal(logits(model, tiny), logits(other, tiny))
    expected = masked_logits(tiny.model(), tiny, {0: [1, 2], 1: [3]}, {})
    torch.testing.assert_close(logits(model, tiny), expected, rtol=0, atol=1e-10)


def test_part_of_a_model_can_be_pruned():
    model = make_model()
    model.bert.prune_heads({0: [0]})
    model.prune_heads({0: [1]})
    assert model.config.pruned_heads == {0: [0, 1]}
    assert model.bert.encoder.layer[0].attention.self.query.out_features == 8


def test_plans_of_tensors_and_of_strings():
    """Whole numbers of any type are accepted, and nothing else."""
    model = make_model()
    plan = PruningPlan.for_model(model, heads={"1": torch.tensor([1, 0])}, neurons={0: torch.arange(3)})
    assert plan.heads == {1: [0, 1]} and plan.neurons == {0: [0, 1, 2]}
    apply_plan(model, plan)
    model.prune_heads({0: torch.tensor([2])})
    assert model.config.pruned_heads == {0: [2], 1: [0, 1]}
    with pytest.raises(TypeError, match=r"\[1.0\] from layer 0: give a list of whole numbers"):
        PruningPlan.for_model(model, heads={0: [1.0]})


def test_training_a_pruned_model(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    apply_plan(model, PruningPlan.for_model(model, heads={0: [1], 1: ALL_HEADS}, neurons={0: ALL_NEURONS, 1: [3]}))
    model.train()
    before = logits(model.eval(), tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    logits(model.train(), tiny).square().sum().backward()
    optimizer.step()
    assert not torch.equal(logits(model.eval(), tiny), before)


def test_pruning_in_inference_mode_leaves_a_model_that_trains():
    model = make_model()
    with torch.inference_mode():
        apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={1: [0, 1, 2]}, implants={1: 1}))
    model(**make_batch()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_hooks_can_be_removed_after_an_error():
    model, calls = make_model(), []
    handle = model.bert.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(RuntimeError, match="interrupted"), undone_on_error(model):
        apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}))
        raise RuntimeError("interrupted")
    handle.remove()
    model(**make_batch())
    assert not calls


def test_configs_of_parts_stay_those_that_modules_read():
    vision = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    config = CLIPConfig(vision_config={**vision, "image_size": 8, "patch_size": 4})
    model = CLIPForImageClassification(config)
    before = config.to_dict()
    with undone_on_error(model, always=True):
        apply_plan(model, PruningPlan.for_model(model, neurons={0: [1]}))
        config.vision_config.hidden_act = "relu"
    assert config.to_dict() == before and model.vision_model.config is config.vision_config


def test_base_model_without_head():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}))
    model.prune_heads({0: [0, 1]})
    assert model.encoder.layer[0].attention.self.query.weight.shape == (8, 16)


@pytest.mark.parametrize("heads", [{LAYERS: [0]}, {-1: [0]}, {0: [HEADS]}, {1: [0], 0: [-1]}], ids=str)
def test_out_of_range_changes_nothing(heads):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Nothing was pruned"):
        prune_heads(model, heads)
    assert untouched(model, before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"removed": {"neurons": {LAYERS: [0]}}}, "the model has layers 0 to 1. Nothing was pruned"),
        ({"removed": {"neurons": {0: [NEURONS]}}}, r"neurons \[24\] of layer 0: they are numbered 0 to 23"),
        ({"removed": {"neurons": {0: [3, 3]}}}, "names a neuron of layer 0 twice"),
        (
            {"removed": {"neurons": {0: [3]}}, "original": {"neurons": [NEURONS, NEURONS - 1]}},
            "this model as it is now",
        ),
        ({"removed": {"heads": {0: [0, 0]}}}, "names a head of layer 0 twice"),
        ({"model_type": "roberta"}, "is for a 'roberta'"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(change, message):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    plan = changed_plan(PruningPlan.for_model(model, heads={1: [0]}, neurons={1: [0]}), **change)
    with pytest.raises(ValueError, match=message):
        apply_plan(model, plan)
    assert untouched(model, before)
