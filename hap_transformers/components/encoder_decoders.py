"""Entries of encoder-decoders in the table of architectures."""

from dataclasses import replace

from .names import Architecture, DecoderNames, EmbeddingNames, HeadNames, NeuronNames
from .shared_names import SELF_ATTENTION


BART_NEURONS = NeuronNames(("fc1",), "fc2", "activation_fn", config_neurons="encoder_ffn_dim")
DECODER_HEADS = replace(
    SELF_ATTENTION, config_query_heads="decoder_attention_heads", config_heads="decoder_attention_heads"
)
BART_DECODER = DecoderNames(
    "decoder.layers",
    {"heads": DECODER_HEADS, "neurons": replace(BART_NEURONS, config_neurons="decoder_ffn_dim")},
    cross_heads=replace(
        DECODER_HEADS,
        attention="encoder_attn",
        query="encoder_attn.q_proj",
        key="encoder_attn.k_proj",
        value="encoder_attn.v_proj",
        output="encoder_attn.out_proj",
    ),
)
WHISPER = Architecture(
    "encoder.layers", {"heads": SELF_ATTENTION, "neurons": BART_NEURONS}, norm_first=True, decoder=BART_DECODER
)
BART = replace(
    WHISPER,
    names={"embedding_dims": EmbeddingNames("shared"), **WHISPER.names},
    norm_first=False,
    decoder=replace(BART_DECODER, reads_inputs=True),
)

T5_HEADS = HeadNames(
    attention="layer.0.SelfAttention",
    query="layer.0.SelfAttention.q",
    key="layer.0.SelfAttention.k",
    value="layer.0.SelfAttention.v",
    output="layer.0.SelfAttention.o",
    position_bias="computed",
    num_heads="n_heads",
    width="inner_dim",
    head_size="key_value_proj_dim",
    scaled=False,
    config_head_size="d_kv",
)
CROSS_HEADS = replace(
    T5_HEADS,
    attention="layer.1.EncDecAttention",
    query="layer.1.EncDecAttention.q",
    key="layer.1.EncDecAttention.k",
    value="layer.1.EncDecAttention.v",
    output="layer.1.EncDecAttention.o",
    position_bias="alike",
)


def t5_neurons(block: str) -> NeuronNames:
    """FFN neurons of T5, with the feed-forward block at this path."""
    inputs = tuple(f"{block}.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1"))
    return NeuronNames(inputs, f"{block}.DenseReluDense.wo", f"{block}.DenseReluDense.act", config_neurons="d_ff")


T5 = Architecture(
    "encoder.block",
    {"embedding_dims": EmbeddingNames("shared"), "heads": T5_HEADS, "neurons": t5_neurons("layer.1")},
    norm_first=True,
    decoder=DecoderNames("decoder.block", {"heads": T5_HEADS, "neurons": t5_neurons("layer.2")}, CROSS_HEADS),
)

ENCODER_DECODERS: dict[str, Architecture] = {"bart": BART, "t5": T5, "whisper": WHISPER}
