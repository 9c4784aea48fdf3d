"""Embeddings as a table times a map: the same function, and the best map of every rank."""

import copy
import dataclasses

import pytest
import torch
from explicit import explicit_factors
from tiny import make_batch, make_batches, make_model
from zoo import ZOO, logits

from hap_transformers import PruningPlan, align_embeddings, apply_plan, estimate_sensitivity
from hap_transformers.alignment import align_embeddings as module
from hap_transformers.alignment.align_kinds import alignment_undone


SEPARATE = ["albert", "bert", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "modernbert", "mpnet", "roberta"]


def align(model, batches, **settings):
    align_embeddings(model, batches, progress=False, **settings)


@pytest.mark.parametrize("model_type", SEPARATE)
def test_logits_are_equal(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    expected, width = logits(model, tiny), model.get_input_embeddings().weight.shape[1]
    align(model, make_batches(tiny, 2))
    torch.testing.assert_close(logits(model, tiny), expected, rtol=1e-10, atol=1e-10)
    assert model.get_input_embeddings().map.weight.shape == (width, width)
    apply_plan(model, PruningPlan.for_model(model, embedding_dims={0: [0, 3]}))
    expected = logits(model, tiny)
    align(model, make_batches(tiny, 2))
    torch.testing.assert_close(logits(model, tiny), expected, rtol=1e-10, atol=1e-10)
    assert model.get_input_embeddings().map.weight.shape == (width, width - 2)


def explicit_moments(batch):
    """The dense embeddings, how often tokens are in a batch, and the second moment of cotangents of embeddings."""
    model = make_model()
    align(model, [batch])
    table = model.get_input_embeddings()
    _, curvature = explicit_factors(model, batch, table.map)  # Those of what the map gives, whatever its basis.
    tokens = batch["input_ids"][batch["attention_mask"].bool()]
    counts = torch.bincount(tokens, minlength=table.num_embeddings).double()
    return make_model().get_input_embeddings().weight.detach(), counts / counts.sum(), curvature


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_every_rank_is_the_best_and_costs_half_of_what_it_leaves_out(monkeypatch, smoothing):
    monkeypatch.setattr(module, "SMOOTHING", smoothing)
    batch = make_batch(64, 12)
    E, share, C = explicit_moments(batch)
    n = (share + smoothing / len(share)) / (1 + smoothing)
    values, vectors = torch.linalg.eigh(C)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    singular = torch.linalg.svdvals(n.sqrt()[:, None] * E @ root)
    model = make_model()
    align(model, [batch])
    table = model.get_input_embeddings()
    for rank in (0, 3, 8, 15):
        error = (E - table.weight[:, :rank] @ table.map.weight[:, :rank].T) @ root
        left_out = (n[:, None] * error.square()).sum()
        torch.testing.assert_close(left_out, singular[rank:].square().sum(), rtol=1e-6, atol=1e-12)
    if not smoothing:
        found = estimate_sensitivity(model, [batch], components=["embedding_dims"], progress=False)
        # The surgeon's ridge of 1 % is part of all its costs.
        expected = 1.01 * singular.square() / 2
        torch.testing.assert_close(found.scores["embedding_dims"][0], expected, rtol=1e-5, atol=1e-12)


def test_tokens_that_are_in_no_text_stay_themselves():
    """They have a small weight; without it they would be whatever the map of the others makes of them."""
    batch = make_batch(16, 12)
    batch["input_ids"] = batch["input_ids"] % 12  # Fewer tokens than dimensions.
    errors = []
    for smoothing in (0.0, 0.05):
        model = make_model()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SMOOTHING", smoothing)
            align(model, [batch])
        dense, table = make_model().get_input_embeddings().weight[12:], model.get_input_embeddings()
        error = dense - table.weight[12:, :12] @ table.map.weight[:, :12].T
        errors.append((error.square().sum() / dense.square().sum()).item())
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize(
    "model_type, task, reason",
    [
        ("bert", "ForMaskedLM", "'embeddings.word_embeddings' shares its weights with 'cls.predictions.decoder'"),
        ("gpt2", "LMHeadModel", "'wte' shares its weights with 'lm_head'.*Untie them first"),
        ("bart", "ForSequenceClassification", "'shared' is a BartScaledWordEmbedding"),
        ("t5", "ForSequenceClassification", "'shared' shares its weights with"),
        ("vit", "ForImageClassification", "its entry in hap_transformers.ARCHITECTURES names none"),
    ],
)
def test_what_cannot_be_of_lower_rank_is_refused(model_type, task, reason):
    tiny = dataclasses.replace(ZOO[model_type], task=task)
    model = tiny.model(torch.float32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"The embedding_dims of this .* must stay: {reason}"):
        align(model, [])
    assert before.keys() == model.state_dict().keys()


def test_the_model_is_as_it_was_if_it_fails():
    model = make_model(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    table = model.get_input_embeddings()
    for batches in ([], [{**make_batch(), "input_ids": torch.full((3, 7), 99)}]):
        with pytest.raises(ValueError, match="No examples|tokens are in the vocabulary"):
            align(model, batches)
    with alignment_undone(model, ["embedding_dims"], always=True):
        align(model, [make_batch()])
        assert model.config.aligned_embeddings
    assert before.keys() == model.state_dict().keys() and type(table) is torch.nn.Embedding
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "aligned_embeddings") and not hasattr(model.config, "quantization_config")
