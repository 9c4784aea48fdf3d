"""Where each supported architecture keeps the projections that heads and neurons own.

This table is all that the package knows about model families. To support another one, add an entry to
`ARCHITECTURES` under its `config.model_type`:

    >>> from hap_transformers import ARCHITECTURES, Architecture
    >>> ARCHITECTURES["my_bert"] = Architecture(layers="encoder.layer", **BERT_NAMES)  # doctest: +SKIP
"""

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from .releases import VIT_RENAMED


@dataclass(frozen=True)
class Architecture:
    """Names of the attention and feed-forward modules of one model family.

    A path that is named n times among `query`, `key` and `value`, or in `ffn_inputs`, is one fused projection, whose
    outputs are in n equal parts, in the order of naming.

    Args:
        layers (`str`): Path of the layers' `ModuleList`, from `model.base_model`. A `*` in it stands for all modules
            of a list; layers are then numbered through all lists.
        attention (`str`): Path, from a layer, of the module that splits its input into heads.
        query (`str`): Path, from a layer, of the query projection.
        key (`str`): Path, from a layer, of the key projection.
        value (`str`): Path, from a layer, of the value projection.
        output (`str`): Path, from a layer, of the projection that reads the heads' concatenated contexts.
        ffn_inputs (`tuple[str, ...]`): Paths, from a layer, of the projections whose outputs are the neurons (or their
            gates). Those that the layer does not have are passed over.
        ffn_output (`str`): Path, from a layer, of the projection that reads the neurons' activations.
        activation (`str`, *optional*): Path, from a layer, of the activation module, which the first of `ffn_inputs`
            goes through. Only implants need it.
        position_inputs (`tuple[str, ...]`, *optional*): Paths, from a layer, of projections of relative positions,
            whose rows go with the heads but are not scored. Those that the layer does not have are passed over.
        position_bias (`str`, *optional*): For attention modules that take an argument `position_bias` with a row for
            each head of the dense model: `"given"` if it always comes from outside, `"computed"` if the first layer
            computes it by `compute_bias` and all return it after their output.
        attention_norm (`str`, *optional*): Path, from a layer, of the LayerNorm that the attention module itself
            applies to the sum of its input and output.
        num_heads (`str`, *optional*): Attribute of the attention module with its number of heads, in those releases
            of Transformers that have it.
        width (`str`, *optional*): Attribute of the attention module with heads x head size, likewise.
        norm_first (`bool`, *optional*, defaults to `False`): Whether each block reads the normalized residual stream
            and adds to it, instead of normalizing the sum.
        config_heads (`str`, *optional*, defaults to `"num_attention_heads"`): Attribute of the config with the dense
            model's heads a layer. Where several query heads share a key/value head, they are one removable head.
        config_head_size (`str`, *optional*, defaults to `"head_dim"`): Attribute of the config with the head size;
            where it has none, that is hidden size / attention heads.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    ffn_inputs: tuple[str, ...]
    ffn_output: str
    activation: str | None = None
    position_inputs: tuple[str, ...] = ()
    position_bias: str | None = None
    attention_norm: str | None = None
    norm_first: bool = False
    num_heads: str = "num_attention_heads"
    width: str = "all_head_size"
    config_heads: str = "num_attention_heads"
    config_head_size: str = "head_dim"


BERT_NAMES: dict[str, Any] = {
    "attention": "attention.self",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "ffn_inputs": ("intermediate.dense",),
    "ffn_output": "output.dense",
    "activation": "intermediate.intermediate_act_fn",
}
BERT = Architecture(layers="encoder.layer", **BERT_NAMES)
# In BART's family a layer's modules are named alike; only the encoder's layers are pruned.
BART = Architecture(
    layers="encoder.layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    ffn_inputs=("fc1",),
    ffn_output="fc2",
    activation="activation_fn",
    num_heads="num_heads",
)
WHISPER = replace(BART, norm_first=True)
LLAMA = Architecture(
    layers="layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    ffn_inputs=("mlp.gate_proj", "mlp.up_proj"),
    ffn_output="mlp.down_proj",
    activation="mlp.act_fn",
    norm_first=True,
    config_heads="num_key_value_heads",
)
VIT_NAMES = {
    **BERT_NAMES,
    "attention": "attention.attention",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
}
VIT = Architecture(layers="encoder.layer", **VIT_NAMES, norm_first=True)
if VIT_RENAMED:
    VIT = Architecture(
        layers="layers",
        attention="attention",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.o_proj",
        ffn_inputs=("mlp.fc1",),
        ffn_output="mlp.fc2",
        activation="mlp.activation_fn",
        norm_first=True,
    )

ARCHITECTURES: dict[str, Architecture] = {
    "albert": Architecture(
        layers="encoder.albert_layer_groups.*.albert_layers",
        attention="attention",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        output="attention.dense",
        attention_norm="attention.LayerNorm",
        ffn_inputs=("ffn",),
        ffn_output="ffn_output",
        activation="activation",
    ),
    "bart": BART,
    "bert": BERT,
    "camembert": BERT,
    "deberta-v2": Architecture(
        layers="encoder.layer",
        **{
            **BERT_NAMES,
            "query": "attention.self.query_proj",
            "key": "attention.self.key_proj",
            "value": "attention.self.value_proj",
        },
        position_inputs=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
    ),
    "deit": VIT,
    "distilbert": Architecture(
        layers="transformer.layer",
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        ffn_inputs=("ffn.lin1",),
        ffn_output="ffn.lin2",
        activation="ffn.activation",
        num_heads="n_heads",
        width="dim",
    ),
    "electra": BERT,
    "gpt2": Architecture(
        layers="h",
        attention="attn",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        ffn_inputs=("mlp.c_fc",),
        ffn_output="mlp.c_proj",
        activation="mlp.act",
        norm_first=True,
        num_heads="num_heads",
        width="split_size",
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "modernbert": Architecture(
        layers="layers",
        attention="attn",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        output="attn.Wo",
        ffn_inputs=("mlp.Wi", "mlp.Wi"),
        ffn_output="mlp.Wo",
        activation="mlp.act",
        norm_first=True,
        num_heads="num_heads",
    ),
    "mpnet": Architecture(
        layers="encoder.layer",
        attention="attention.attn",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        output="attention.attn.o",
        ffn_inputs=("intermediate.dense",),
        ffn_output="output.dense",
        activation="intermediate.intermediate_act_fn",
        position_bias="given",
    ),
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "roberta": BERT,
    "t5": Architecture(
        layers="encoder.block",
        attention="layer.0.SelfAttention",
        query="layer.0.SelfAttention.q",
        key="layer.0.SelfAttention.k",
        value="layer.0.SelfAttention.v",
        output="layer.0.SelfAttention.o",
        ffn_inputs=("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
        ffn_output="layer.1.DenseReluDense.wo",
        activation="layer.1.DenseReluDense.act",
        position_bias="computed",
        norm_first=True,
        num_heads="n_heads",
        width="inner_dim",
        config_head_size="d_kv",
    ),
    "vit": VIT,
    "whisper": WHISPER,
    "xlm-roberta": BERT,
}


def get_architecture(model: PreTrainedModel) -> Architecture:
    """Looks up the table entry of a model.

    Raises:
        ValueError: If the model's type is not in `ARCHITECTURES`, or the model is quantized.
        TypeError: If it is no model of Transformers.
    """
    if not hasattr(model, "config"):
        raise TypeError(f"{type(model).__name__} has no config; give a model of Transformers, such as BertModel.")
    model_type = model.config.model_type
    quantized = getattr(model.config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
    if quantized is not None and method != "hap":
        raise ValueError(
            f"{type(model).__name__} is quantized (quant_method '{method}'); score and prune before quantizing."
        )
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__} has model type '{model_type}', which hap_transformers does not know. Supported: "
            f"{', '.join(sorted(ARCHITECTURES))}. To add it, set hap_transformers.ARCHITECTURES['{model_type}'] = "
            "Architecture(...) with the names of its attention and feed-forward projections."
        )
    return ARCHITECTURES[model_type]
