"""A pruned language model generates what a masked dense one does, token by token, in every way to generate."""

import dataclasses

import pytest
import torch
from dims import masked_dims, without
from seq2seq import SELF, SEQ2SEQ
from zoo import HEADS, ZOO, masked

from hap_transformers import PruningPlan, apply_plan


TINY, OPT = (dataclasses.replace(ZOO[name], task="ForCausalLM") for name in ("llama", "opt"))
HEADS_GONE, NEURONS_GONE = {0: [1, 2], 1: [0]}, {0: [0, 5, 7], 1: list(range(24))}
DIMS_GONE = {0: {0: ([0, 2], [1]), 2: ([1], [0, 1, 3])}, 1: {1: ([], [0, 1]), 3: ([0, 1], [])}}
LONG = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def model_of(gone):
    """The dense model, and it masked and pruned: some heads and neurons, some dimensions, or a layer's attention."""
    tiny = OPT if gone == "heads of OPT" else TINY
    dense = tiny.model(tie_word_embeddings=True)
    if gone == "dims":
        expected, pruned = masked_dims(dense, tiny, DIMS_GONE), without(dense, tiny, DIMS_GONE)
        return tiny.model(tie_word_embeddings=True), expected, pruned
    heads = {0: list(range(HEADS)), 1: [2]} if gone == "attention" else HEADS_GONE
    expected = masked(dense, tiny, heads, NEURONS_GONE)
    apply_plan(dense, PruningPlan.for_model(dense, heads=heads, neurons=NEURONS_GONE))
    return tiny.model(tie_word_embeddings=True), expected, dense


@pytest.fixture(scope="module", params=["heads", "dims", "attention", "heads of OPT"])
def models(request):
    return model_of(request.param)


@pytest.fixture
def prompt():
    return torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {"num_beams": 3}, {}], ids=str)
def test_caches_and_beams(models, prompt, settings):
    _, expected, pruned = models
    found = pruned.generate(prompt, **LONG, **settings)
    without_cache = {name: value for name, value in settings.items() if name != "cache_implementation"}
    assert torch.equal(found, expected.generate(prompt, **LONG, **without_cache, use_cache=False))


@pytest.mark.parametrize("gone, numbers", [("heads", [2 * 4, 3 * 4]), ("attention", [1, 3 * 4])])
def test_caches_hold_the_heads_that_are_left(gone, numbers, prompt):
    """Of every token they keep the dimensions of all heads, in an emptied layer one number, which counts tokens."""
    cache = model_of(gone)[2](prompt, use_cache=True).past_key_values
    assert [layer.keys.numel() for layer in cache.layers] == [prompt.numel() * count for count in numbers]
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 6]


@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {}], ids=str)
def test_caches_where_the_first_layer_of_a_decoder_only_gives_position_biases(settings):
    """Those of T5, by the place of the token that is decoded."""
    tiny, gone = SEQ2SEQ["t5"], {SELF[0]: list(range(HEADS))}
    dense = tiny.model()
    batch = {name: value for name, value in tiny.batch().items() if name != "labels"}
    settings = {**batch, **LONG, "return_dict_in_generate": True, "output_logits": True, **settings}
    wanted = tiny.masked(dense, heads=gone).generate(**settings).logits
    apply_plan(dense, PruningPlan.for_model(dense, heads=gone))
    torch.testing.assert_close(dense.generate(**settings).logits, wanted, rtol=0, atol=1e-10)


def test_left_padding_changes_nothing(models, prompt):
    _, expected, pruned = models
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), prompt], 1)
    mask = (torch.arange(8) >= 2).long().expand(3, -1)
    settings = {**LONG, "pad_token_id": 0}
    found = pruned.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(found[:, 2:], pruned.generate(prompt, **settings))
    assert torch.equal(found, expected.generate(padded, attention_mask=mask, **settings, use_cache=False))


def test_a_pruned_model_drafts_for_the_dense_one(models, prompt):
    dense, _, pruned = models
    settings = {"max_new_tokens": 12, "do_sample": False}
    alone = dense.generate(prompt[:1], **settings)
    assert torch.equal(dense.generate(prompt[:1], assistant_model=pruned, **settings), alone)
    drafted = pruned.generate(prompt[:1], assistant_model=dense, **settings)
    assert torch.equal(drafted, pruned.generate(prompt[:1], **settings))
