"""Removing heads must equal masking them in the dense model."""

import copy

import pytest
import torch
import transformers
from conftest import HEADS, LAYERS, MODELS, OUTPUTS, make_batch, make_model
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, MPNetConfig, MPNetModel

from hap_transformers import prune_heads


def masked_logits(model, model_type, heads, batch):
    """The dense model's logits with the output projection blind to the removed heads."""
    masked = copy.deepcopy(model)
    for layer, removed in heads.items():
        weight = masked.get_submodule(OUTPUTS[model_type].format(layer)).weight.data
        for head in removed:
            weight.view(weight.shape[0], HEADS, -1)[:, head] = 0
    return masked(**batch).logits


RANDOM = torch.Generator().manual_seed(1)
REMOVALS = [
    {layer: torch.randperm(HEADS, generator=RANDOM)[:count].tolist() for layer, count in enumerate(counts)}
    for counts in [(1, 2), (3, 1), (2, 3), (0, HEADS), (HEADS, 1), (HEADS, HEADS)]
]


@pytest.mark.parametrize("heads", REMOVALS, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_removing_equals_masking(model_type, heads, attention):
    if attention == "sdpa" and not MODELS[model_type][1]._supports_sdpa:
        pytest.skip(f"{model_type} has no sdpa attention in Transformers {transformers.__version__}")
    model = make_model(model_type, attn_implementation=attention)
    batch = make_batch()
    expected = masked_logits(model, model_type, heads, batch)
    before = sum(p.numel() for p in model.parameters())
    dense = model(**batch).logits
    prune_heads(model, heads)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-10)
    assert (dense - expected).abs().max() > 1e-3
    # Per head and projection: 4 rows (columns) of 16 weights, and 4 biases in three of the four.
    assert before - sum(p.numel() for p in model.parameters()) == sum(map(len, heads.values())) * (4 * 4 * 16 + 3 * 4)


def test_old_contract(model_type):
    """Numbers are the original ones, prunings accumulate, repeated heads are passed over."""
    model, other = make_model(model_type), make_model(model_type)
    model.prune_heads({0: [1]})
    model.prune_heads({0: [1, 2], 1: [3]})
    other.prune_heads({0: [2, 1], 1: [3]})
    batch = make_batch()
    assert model.config.pruned_heads == {0: [1, 2], 1: [3]}
    assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_headless_layer_computes_no_attention(model_type):
    model = make_model(model_type, attn_implementation="eager")
    model.prune_heads({0: range(HEADS)})
    batch = make_batch()
    attentions = [a for a in model(**batch, output_attentions=True).attentions if a is not None]
    assert [a.shape[1] for a in attentions] == [0, HEADS]
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("query" in name or "q_lin" in name):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model(**batch)
    assert [module.out_features for module in calls] == [16]


def test_keeps_dtype_hooks_and_requires_grad():
    model = make_model(dtype=torch.bfloat16)
    query = model.bert.encoder.layer[0].attention.self.query
    query.weight.requires_grad_(False)
    calls = []
    query.register_forward_hook(lambda *_: calls.append(1))
    prune_heads(model, {0: [0]})
    model(**make_batch())
    assert calls == [1]
    assert query.weight.dtype == torch.bfloat16 and not query.weight.requires_grad and query.bias.requires_grad


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
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not getattr(model.config, "pruned_heads", None)


def test_unknown_architecture_names_the_supported_ones():
    model = MPNetModel(
        MPNetConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=10)
    )
    with pytest.raises(ValueError, match="'mpnet'.*bert, distilbert, electra, gpt2, roberta.*ARCHITECTURES"):
        prune_heads(model, {0: [0]})


def test_fused_projections_are_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    with pytest.raises(ValueError, match="GPT2LMHeadModel: 'h.0.attn.c_attn' is a fused Conv1D.*can be scored"):
        prune_heads(model, {0: [0]})
