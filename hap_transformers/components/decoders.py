"""Where families of causal language models keep the modules that components own."""

from dataclasses import replace

from .names import Architecture, EmbeddingNames, NeuronNames
from .releases import GEMMA3_LAYERS
from .shared_names import SELF_ATTENTION


LLAMA_HEADS = replace(
    SELF_ATTENTION,
    output="self_attn.o_proj",
    num_heads="num_attention_heads",
    bilinear=False,
    rotary=True,
    config_heads="num_key_value_heads",
)
LLAMA_NEURONS = NeuronNames(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "mlp.act_fn")
LAYERS = {"heads": LLAMA_HEADS, "neurons": LLAMA_NEURONS}
LLAMA = Architecture("layers", {"embedding_dims": EmbeddingNames("embed_tokens"), **LAYERS}, norm_first=True)
GEMMA = replace(LLAMA, names=LAYERS)
QWEN3_HEADS = replace(LLAMA_HEADS, query_norm="self_attn.q_norm")

# What attention and feed-forward blocks give is normalized before it is added to the residual stream.
GEMMA2 = replace(
    LLAMA, names={"heads": replace(LLAMA_HEADS, apart=True), "neurons": replace(LLAMA_NEURONS, apart=True)}
)
GEMMA3 = replace(GEMMA2, layers=GEMMA3_LAYERS, names={**GEMMA2.names, "heads": replace(QWEN3_HEADS, apart=True)})
# Rotary embeddings turn only a part of a head.
PHI = Architecture(
    "layers",
    {
        "heads": replace(LLAMA_HEADS, output="self_attn.dense", rotary=False),
        "neurons": NeuronNames(("mlp.fc1",), "mlp.fc2", "mlp.activation_fn"),
    },
    norm_first=True,
)
# Of these only neurons are components: queries, keys and values of Phi-3 are unequal parts of one projection, those of
# GPT-NeoX are interleaved, and OLMo 2 normalizes the queries of all heads together.
PHI3_NEURONS = NeuronNames(("mlp.gate_up_proj", "mlp.gate_up_proj"), "mlp.down_proj", "mlp.activation_fn")
GPT_NEOX_NEURONS = NeuronNames(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "mlp.act")
# Its feed-forward block reads the tokens of all texts as rows of one matrix.
OPT = Architecture(
    "decoder.layers",
    {
        "embedding_dims": EmbeddingNames("decoder.embed_tokens"),
        "heads": SELF_ATTENTION,
        "neurons": NeuronNames(("fc1",), "fc2", "activation_fn", norm="final_layer_norm", config_neurons="ffn_dim"),
    },
    norm_first=True,
    requires={"do_layer_norm_before": True},
)

DECODERS: dict[str, Architecture] = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt_neox": Architecture("layers", {"neurons": GPT_NEOX_NEURONS}, norm_first=True),
    "granite": GEMMA2,  # It multiplies what blocks give.
    "llama": LLAMA,
    "mistral": LLAMA,
    "olmo": GEMMA,
    "olmo2": Architecture("layers", {"neurons": replace(LLAMA_NEURONS, apart=True)}, norm_first=True),
    "opt": OPT,
    "phi": PHI,
    "phi3": Architecture("layers", {"neurons": PHI3_NEURONS}, norm_first=True),
    "qwen2": LLAMA,
    "qwen3": replace(LLAMA, names={**LLAMA.names, "heads": QWEN3_HEADS}),
}
