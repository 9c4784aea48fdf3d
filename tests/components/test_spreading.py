"""Projections with fewer features of every head than attention works with."""

import copy
import pickle

import pytest
import torch
from dims import CASES, masked_dims, numbers, without
from tiny import make_batch, make_model
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo import ZOO, logits

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.components.spreading import features_left, gather_inputs, spread_outputs, with_zeros


SIZES = [[2, 0, 4], [4, 4, 4], [0, 0, 0], [0, 1, 0], ["1010", 0, "0110"], [4, "0101", 1], 3 * ["0000"]]
DIM = 4


def places(sizes):
    marks = [own if isinstance(own, str) else own * "1" for own in sizes]
    return [head * DIM + i for head, own in enumerate(marks) for i, mark in enumerate(own) if mark == "1"]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_features_come_back_to_their_places(sizes):
    features = torch.randn(2, 5, len(places(sizes)))
    spread = with_zeros(features, sizes, DIM)
    assert spread.shape == (2, 5, 3 * DIM) and spread.dtype == features.dtype
    expected = torch.zeros_like(spread)
    expected[..., places(sizes)] = features
    assert torch.equal(spread, expected) and torch.equal(features_left(spread, sizes, DIM), features)


def projection(kind, outputs, inputs):
    return nn.Linear(inputs, outputs) if kind is nn.Linear else Conv1D(outputs, inputs)


def selected(module, dim, index):
    """The same module with some of its outputs (dimension 0) or inputs (1)."""
    matrix = module.weight if isinstance(module, nn.Linear) else module.weight.T
    smaller = projection(type(module), *matrix.index_select(dim, index).shape)
    with torch.no_grad():
        rows = matrix.index_select(dim, index)
        smaller.weight.copy_(rows if isinstance(module, nn.Linear) else rows.T)
        smaller.bias.copy_(module.bias if dim else module.bias[index])
    return smaller


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_modules_are_as_wide_outside_as_before(kind, sizes):
    index, x = torch.tensor(places(sizes), dtype=torch.long), torch.randn(2, 5, 6, requires_grad=True)
    whole = projection(kind, 3 * DIM, 6)
    module = selected(whole, 0, index)
    spread_outputs(module, sizes, DIM)
    mask = torch.zeros(3 * DIM)
    mask[index] = 1
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(other, kind)
        torch.testing.assert_close(other(x), whole(x) * mask)
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad((whole(x) * mask).square().sum(), x)[0])
    if not len(index):  # An attention without any contexts is not computed.
        return
    contexts = torch.randn(2, 5, 3 * DIM, requires_grad=True)
    whole = projection(kind, 6, 3 * DIM)
    module = selected(whole, 1, index)
    gather_inputs(module, sizes, DIM)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(contexts), whole(contexts * mask))
    (gradient,) = torch.autograd.grad(module(contexts).square().sum(), contexts)
    expected = torch.autograd.grad(whole(contexts * mask).square().sum(), contexts)[0]
    torch.testing.assert_close(gradient, expected)


def test_places_that_inference_made_serve_training():
    module, x = nn.Linear(6, 7), torch.randn(2, 6)
    spread_outputs(module, ["10011", 0, "01111"], 5)
    with torch.inference_mode():
        expected = module(x).clone()
    found = module(x)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    assert module.weight.grad.abs().sum(1).gt(0).all()


def test_sizes_may_change_again():
    whole, x = nn.Linear(6, 3 * DIM), torch.randn(2, 6)
    for sizes in SIZES[:2]:
        module = selected(whole, 0, torch.tensor(places(sizes)))
        spread_outputs(module, [1, 1, sum(sizes) - 2], 12)
        spread_outputs(module, sizes, DIM)
        assert torch.equal(features_left(module(x), sizes, DIM), nn.Linear.forward(module, x))


@pytest.mark.parametrize(
    "model_type", ["bert", "deberta-v2", "distilbert", "gpt2", "llama", "modernbert", "mpnet", "t5"]
)
def test_lora_is_put_on_merged_and_saved(model_type, tmp_path):
    """Adapters take the places of projections, and have the sizes that these have."""
    peft = pytest.importorskip("peft")
    tiny = ZOO[model_type]
    model = without(tiny.model(torch.float32), tiny, CASES["a head"])
    expected = logits(model, tiny)
    modules = sorted({path.split(".")[-1] for path in (*tiny.heads_in, tiny.heads_out, tiny.neurons_out)})
    config = peft.LoraConfig(r=2, target_modules=modules, exclude_modules=[r".*decoder.*"], lora_dropout=0.0)
    config.fan_in_fan_out = model_type == "gpt2"
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    torch.testing.assert_close(logits(adapted, tiny), expected)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # The second factor is zero in the first step.
        logits(adapted, tiny).square().sum().backward()
        optimizer.step()
    learned = logits(adapted.eval(), tiny)
    assert not torch.allclose(learned, expected, atol=1e-3)
    restored = copy.deepcopy(adapted).unload()
    torch.testing.assert_close(logits(restored, tiny), expected)
    merged = adapted.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(logits(merged, tiny), learned, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path), tiny), logits(merged, tiny))
    apply_plan(merged, PruningPlan.for_model(merged, value_dims={1: [0]}))


def test_other_modules_may_take_the_place():
    """Whatever computes what the projection did."""
    model = without(make_model(), ZOO["bert"], CASES["some"])
    expected = logits(model, ZOO["bert"])
    attention = model.bert.encoder.layer[0].attention
    before = attention.self.query
    attention.self.query = nn.Sequential(before)
    attention.output.dense = nn.Sequential(attention.output.dense)
    attention.self.dropout = nn.Identity()
    torch.testing.assert_close(logits(model, ZOO["bert"]), expected, rtol=0, atol=0)
    assert type(before) is nn.Linear and before(torch.zeros(1, 16).double()).shape == (1, before.out_features)
    attention.self.query = before
    attention.output.dense = attention.output.dense[0]
    torch.testing.assert_close(logits(model, ZOO["bert"]), expected, rtol=0, atol=0)


def test_trained_with_gradient_checkpointing():
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    other = masked_dims(model, ZOO["bert"], CASES["some"]).train()
    apply_plan(model, PruningPlan.for_model(model, **numbers(model, ZOO["bert"], CASES["some"])))
    model.train().gradient_checkpointing_enable()
    for each in (model, other):
        each(**make_batch(4)).loss.backward()
    gradients = [each.bert.embeddings.word_embeddings.weight.grad for each in (model, other)]
    torch.testing.assert_close(*gradients)
