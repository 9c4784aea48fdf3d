"""Entries of convolutional networks in the table of architectures."""

from .names import Architecture, Chain, ChannelNames, NeuronNames


def _chains_of(*names: str) -> tuple[Chain, ...]:
    """The channels between every two of some convolutions, each with its norm, that follow each other."""
    return tuple(
        Chain(
            f"{writer}.convolution", f"{reader}.convolution", (f"{writer}.normalization",), f"{reader}.normalization"
        )
        for writer, reader in zip(names, names[1:], strict=False)
    )


# A basic layer has two convolutions, a bottleneck three.
RESNET = Architecture(
    "encoder.stages.*.layers", {"channels": ChannelNames(_chains_of("layer.0", "layer.1", "layer.2"), "shortcut")}
)
GROUPED = ("layer.0.normalization", "layer.1.convolution", "layer.1.normalization")
REGNET = Architecture(
    "encoder.stages.*.layers",
    {
        "channels": ChannelNames(
            (
                Chain("layer.0.convolution", "layer.2.convolution", GROUPED, "layer.2.normalization"),
                Chain(
                    "layer.0.convolution",
                    "layer.3.convolution",
                    GROUPED,
                    "layer.3.normalization",
                    ("layer.2.attention.0", "layer.2.attention.2"),
                ),
            ),
            "shortcut",
        )
    },
)
MOBILENET_V2 = Architecture(
    "layer",
    {
        "channels": ChannelNames(
            (
                Chain(
                    "expand_1x1.convolution",
                    "reduce_1x1.convolution",
                    ("expand_1x1.normalization", "conv_3x3.convolution", "conv_3x3.normalization"),
                    "reduce_1x1.normalization",
                ),
            ),
            added="use_residual",
        )
    },
)
# Blocks without expansion act on the residual stream's own channels and are not pruned.
EFFICIENTNET = Architecture(
    "encoder.blocks",
    {
        "channels": ChannelNames(
            (
                Chain(
                    "expansion.expand_conv",
                    "projection.project_conv",
                    ("expansion.expand_bn", "depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"),
                    "projection.project_bn",
                    ("squeeze_excite.reduce", "squeeze_excite.expand"),
                ),
            ),
            added="projection.apply_dropout",
        )
    },
)
CONVNEXT = Architecture(
    "encoder.stages.*.layers",
    {"neurons": NeuronNames(("pwconv1",), "pwconv2", "act", followers=("grn",), apart=True)},
    norm_first=True,
)

CONVOLUTIONAL = {
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "efficientnet": EFFICIENTNET,
    "mobilenet_v2": MOBILENET_V2,
    "regnet": REGNET,
    "resnet": RESNET,
}
