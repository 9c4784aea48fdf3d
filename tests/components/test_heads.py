"""Attention without some or all of its heads behaves as masked attention does, with its maps and caches."""

import dataclasses

import pytest
import torch
from zoo import ALL_HEADS, HEADS, ZOO, masked


def test_attention_maps_of_pruned_layers(model_type):
    tiny = ZOO[model_type]
    model = tiny.model(attn_implementation="eager")
    model.prune_heads({0: ALL_HEADS, 1: [0]})
    outputs = model(**tiny.batch(), output_attentions=True)
    maps = outputs.get("attentions") or outputs.get("encoder_attentions")
    if model_type == "albert":  # Two calls share a layer's weights.
        maps = maps[::2]
    expected = [0, (HEADS - 1) * tiny.shared]
    if model_type == "swin":  # Only the last layer of a list has one.
        expected = expected[1:]
    assert [attention.shape[1] for attention in maps if attention is not None] == expected


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("heads", [{0: ALL_HEADS}, {1: ALL_HEADS}, {0: [1, 2], 1: [0]}], ids=str)
def test_generation_with_a_cache(model_type, heads):
    """The cache counts the tokens seen, even in layers without heads."""
    tiny = dataclasses.replace(ZOO[model_type], task="LMHeadModel" if model_type == "gpt2" else "ForCausalLM")
    model = tiny.model(tie_word_embeddings=True)
    expected = masked(model, tiny, heads, {})
    model.prune_heads(heads)
    settings = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    prompt = tiny.batch()["input_ids"]
    tokens = model.generate(prompt, **settings)
    assert torch.equal(tokens, expected.generate(prompt, **settings, use_cache=False))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
@pytest.mark.parametrize("heads", [{0: ALL_HEADS}, {1: ALL_HEADS}, {0: [1, 2], 1: [0]}], ids=str)
@pytest.mark.parametrize("cross_attention", [False, True])
def test_decoders_with_an_encoder_decoder_cache(model_type, heads, cross_attention):
    """Decoders with cross-attention lose heads of their self-attention."""
    tiny = dataclasses.replace(ZOO[model_type], task="LMHeadModel")
    # Transformers 4 cannot make BERT's causal mask in float64.
    model = tiny.model(torch.float32, is_decoder=True, add_cross_attention=cross_attention)
    expected = masked(model, tiny, heads, {})
    model.prune_heads(heads)
    batch = {**tiny.batch(), **({"encoder_hidden_states": torch.ones(3, 5, 16)} if cross_attention else {})}
    torch.testing.assert_close(model(**batch, use_cache=True).logits, expected(**batch, use_cache=False).logits)
