"""Unusual but legitimate models and batches have the scores of plain ones."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
from tiny import make_batch, make_model
from transformers import BertConfig, BertForMaskedLM

from hap_transformers import METHODS, estimate_sensitivity, plan_pruning


def scores(model, batches, method, **settings):
    found = estimate_sensitivity(model, batches, method, progress=False, **settings)
    return torch.cat([*found.heads, *found.neurons])


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def test_components_with_zero_weights_matter_least(method):
    """A component that no output reads has no effect."""
    model = make_model()
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight[:, 4:8] = 0
        model.bert.encoder.layer[1].output.dense.weight[:, 3] = 0
        for module in ("query", "key", "value"):
            getattr(model.bert.encoder.layer[0].attention.self, module).weight[4:8] = 0
            getattr(model.bert.encoder.layer[0].attention.self, module).bias[4:8] = 0
        model.bert.encoder.layer[1].intermediate.dense.weight[3] = 0
        model.bert.encoder.layer[1].intermediate.dense.bias[3] = 0
    found = estimate_sensitivity(model, [make_batch(8)], method, progress=False)
    if method != "random":
        assert found.heads[0][1] == pytest.approx(0, abs=1e-15) and found.neurons[1][3] == pytest.approx(0, abs=1e-15)
    assert all(layer.isfinite().all() for layer in found.heads + found.neurons)
    plan_pruning(found, model, ratio=0.5, neuron_multiple=1).validate(model)


def test_frozen_weights_are_scored_alike_and_stay_frozen(method):
    model = make_model()
    expected = scores(model, [make_batch()], method)
    model.base_model.requires_grad_(False)
    torch.testing.assert_close(scores(model, [make_batch()], method), expected)
    assert not any(parameter.requires_grad for parameter in model.base_model.parameters())
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())


def test_gradient_checkpointing_changes_nothing(method):
    model = make_model()
    expected = scores(model, [make_batch()], method)
    model.gradient_checkpointing_enable()
    model.train()
    torch.testing.assert_close(scores(model, [make_batch()], method), expected)
    assert model.is_gradient_checkpointing and model.training


def test_tied_embeddings_are_not_counted_twice(method):
    """Tied and untied embeddings with the same weights give the same scores."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    tied = BertForMaskedLM(BertConfig(vocab_size=40, **sizes)).double().eval()
    assert tied.cls.predictions.decoder.weight is tied.bert.embeddings.word_embeddings.weight
    untied = copy.deepcopy(tied)
    untied.cls.predictions.decoder.weight = torch.nn.Parameter(tied.cls.predictions.decoder.weight.detach().clone())
    batch = {**make_batch(2), "labels": make_batch(2)["input_ids"]}
    found = [scores(model, [batch], method) for model in (tied, untied)]
    torch.testing.assert_close(*found)


def test_embeddings_for_inputs(method):
    model, batch = make_model(), make_batch()
    expected = scores(model, [batch], method)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    embedded = {"inputs_embeds": embeddings, **{k: v for k, v in batch.items() if k != "input_ids"}}
    torch.testing.assert_close(scores(model, [embedded], method), expected)


@pytest.mark.parametrize("length", [1, 2, 32])
def test_shortest_and_longest_inputs(method, length):
    """More padding changes no score."""
    model, batch = make_model(), make_batch(4, max(length, 4))
    batch = {name: value if name == "labels" else value[:, :length] for name, value in batch.items()}
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    found = scores(model, [batch], method)
    assert found.isfinite().all() and (method in ("hessian_trace", "magnitude", "random") or (found >= 0).all())
    if length < 32:
        padding = torch.zeros(4, 2, dtype=torch.long)
        padded = {
            "input_ids": torch.cat([batch["input_ids"], padding], 1),
            "attention_mask": torch.cat([batch["attention_mask"], padding], 1),
            "labels": batch["labels"],
        }
        torch.testing.assert_close(scores(model, [padded], method), found, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("hessian_trace", "random")])
def test_a_model_in_bf16_ranks_as_in_fp64(method):
    batches = [make_batch(8, seed=seed) for seed in range(3)]
    model = make_model()
    exact, rounded = (scores(model.to(dtype), batches, method) for dtype in (torch.float64, torch.bfloat16))
    assert rounded.isfinite().all() and rounded.dtype == torch.float64
    assert spearmanr(exact, rounded).statistic > 0.95


@pytest.mark.parametrize("method", ["kronecker", "gauss_newton_trace", "gradient", "fisher"])
def test_batches_of_any_sizes_are_one_sample(method):
    rows = make_batch(9)
    parts = [{name: value[cut] for name, value in rows.items()} for cut in (slice(0, 5), slice(5, 6), slice(6, 9))]
    model = make_model()
    torch.testing.assert_close(scores(model, parts, method), scores(model, [rows], method), rtol=1e-8, atol=1e-14)
