"""The table of architectures defines what is supported, and users can add entries."""

import dataclasses

import pytest
from tiny import make_model
from transformers import BertConfig, BertModel, BloomConfig, BloomModel, OPTConfig, OPTForCausalLM

from hap_transformers import (
    ARCHITECTURES,
    Architecture,
    HeadNames,
    NeuronNames,
    PruningPlan,
    apply_plan,
    prune_heads,
)


def test_quantized_models_are_refused():
    model = make_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="is quantized .quant_method 'gptq'.; score and prune before quantizing"):
        model.prune_heads({0: [0]})


def test_unknown_architecture_names_the_supported_ones():
    model = BloomModel(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=10))
    with pytest.raises(ValueError, match="'bloom'.*albert, bart, beit, bert, .*ARCHITECTURES"):
        prune_heads(model, {0: [0]})


def test_a_model_that_is_built_otherwise_is_refused():
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1, "vocab_size": 10}
    model = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, do_layer_norm_before=False))
    with pytest.raises(ValueError, match="OPTForCausalLM has do_layer_norm_before=False; .*=True only"):
        prune_heads(model, {0: [0]})


def test_an_entry_for_ones_own_model(monkeypatch):
    class OwnConfig(BertConfig):
        model_type = "own"

    class OwnModel(BertModel):
        config_class = OwnConfig

    heads = HeadNames(
        attention="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
    )
    neurons = NeuronNames(inputs=("intermediate.dense",), output="output.dense")

    def register(**names):
        entry = Architecture("encoder.layer", {"heads": heads, "neurons": neurons, **names})
        monkeypatch.setitem(ARCHITECTURES, "own", entry)

    model = OwnModel(OwnConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8))
    register(heads=dataclasses.replace(heads, key="attention.self.keys"))
    with pytest.raises(ValueError, match="'encoder.layer.0' of OwnModel has no module 'attention.self.keys'"):
        prune_heads(model, {0: [0]})
    register(neurons=dataclasses.replace(neurons, inputs=("intermediate.dens",)))
    with pytest.raises(ValueError, match=r"'encoder.layer.0.output.dense' of OwnModel reads 8 neurons, but \[\] give"):
        prune_heads(model, {0: [0]})
    register()
    apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={0: [0, 1]}))
    layer = model.encoder.layer[0]
    assert layer.attention.self.key.weight.shape == (12, 16) and layer.output.dense.weight.shape == (16, 6)
