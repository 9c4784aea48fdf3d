"""Entries of vision Transformers, and of towers that read images or texts, in the table of architectures."""

from dataclasses import replace

from .names import Architecture, HeadNames, NeuronNames
from .releases import DINOV2_RENAMED, TOWERS_OF_INPUT_WIDTH, VIT_RENAMED
from .shared_names import BERT_NEURONS, SELF_ATTENTION, bert_heads


TOWERS = ("vision", "text")


RENAMED_HEADS = HeadNames(
    attention="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    head_size="head_dim",
)
MLP = NeuronNames(("mlp.fc1",), "mlp.fc2", "mlp.activation_fn")
HEADS, NEURONS = (RENAMED_HEADS, MLP) if VIT_RENAMED else (bert_heads("attention.attention"), BERT_NEURONS)
LAYERS = "layers" if VIT_RENAMED else "encoder.layer"

VIT = Architecture(LAYERS, {"heads": HEADS, "neurons": NEURONS}, norm_first=True)
BEIT = Architecture(
    LAYERS,
    {
        "heads": replace(
            HEADS,
            position_bias="given",
            bias_argument="attention_mask" if VIT_RENAMED else "relative_position_bias",
            position_modules=(("" if VIT_RENAMED else "attention.attention.") + "relative_position_bias",),
            scale="lambda_1",
        ),
        "neurons": replace(NEURONS, scale="lambda_2", norm="layernorm_after"),
    },
    norm_first=True,
)

if DINOV2_RENAMED:
    DINOV2_HEADS = RENAMED_HEADS
    SWIGLU = NeuronNames(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "mlp.act_fn")
else:
    DINOV2_HEADS = bert_heads("attention.attention")
    SWIGLU = NeuronNames(("mlp.weights_in", "mlp.weights_in"), "mlp.weights_out")
SWIGLU = replace(SWIGLU, scale="layer_scale2.lambda1", norm="norm2")
DINOV2_NEURONS = NeuronNames(
    ("mlp.fc1",),
    "mlp.fc2",
    "mlp.activation_fn" if DINOV2_RENAMED else "mlp.activation",
    scale="layer_scale2.lambda1",
    norm="norm2",
    otherwise=SWIGLU,
)
DINOV2 = Architecture(
    "encoder.layer",
    {
        "heads": replace(DINOV2_HEADS, scale="layer_scale1.lambda1"),
        "neurons": DINOV2_NEURONS,
    },
    norm_first=True,
)

if VIT_RENAMED:
    SWIN_HEADS = replace(RENAMED_HEADS, position_modules=("attention.relative_position_bias",), windowed=True)
else:
    TABLE = "relative_position_bias_table"
    SWIN_HEADS = bert_heads("attention.self", position_bias="table", bias_argument=TABLE, windowed=True)
SWIN = Architecture(
    "encoder.layers.*.blocks",
    {
        "heads": SWIN_HEADS,
        "neurons": replace(NEURONS, norm="layernorm_after"),
    },
    norm_first=True,
)

TOWER = Architecture(
    "encoder.layers",
    {
        "heads": replace(SELF_ATTENTION, width_of_input=TOWERS_OF_INPUT_WIDTH),
        "neurons": MLP,
    },
    norm_first=True,
    tower="vision",
)

VISION = {
    "beit": BEIT,
    "deit": VIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2,
    "swin": SWIN,
    "vit": VIT,
    **{family: TOWER for family in ("clip", "siglip")},
    **{f"{family}_{tower}_model": replace(TOWER, tower=tower) for family in ("clip", "siglip") for tower in TOWERS},
}
