"""Models that were read from a GGUF file are pruned, trained and saved like others."""

import json
import re

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from hap_transformers import HapConfig, HapTrainer, PruningPlan, apply_plan
from hap_transformers.components.releases import TRANSFORMERS_4


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny Llama as a GGUF file with quantized matrices."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40, max_position_embeddings=32))
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(40)
    for name, weight in model.state_dict().items():
        layer, inner = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name).groups()
        stored = NAMES[inner] if layer is None else f"blk.{layer}.{NAMES[inner]}"
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{stored}.weight", gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(file):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)


def test_it_is_pruned_and_saved_as_an_ordinary_model(file, tmp_path):
    model, ids = read(file), torch.arange(3, 12)[None]
    apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={1: range(8)}))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "hap"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(ids).logits, model(ids).logits)


def test_the_dense_model_is_saved_without_the_entry(file, tmp_path):
    model = read(file)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not getattr(model, "is_quantized", False)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(*pair) for pair in zip(reloaded.parameters(), model.parameters(), strict=True))


def test_it_is_trained(file, tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = HapTrainer(model=read(file), args=args, hap_config=HapConfig(distillation=1.0))
    assert getattr(trainer.model.config, "quantization_config", None) is None


def test_packed_weights_are_refused(file):
    model = read(file)
    model.config.quantization_config = {"quant_method": "gguf"}
    packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.down_proj.weight = packed
    with pytest.raises(ValueError, match="is quantized .quant_method 'gguf'"):
        model.prune_heads({0: [0]})
    if not TRANSFORMERS_4:  # It does not know whether a model was read from such a file.
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(file.parent / "packed")
