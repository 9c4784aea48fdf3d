"""Sizes of the CIFAR networks of the HAP and EHAP papers."""

from typing import Any

from transformers import PretrainedConfig


class CifarResNetConfig(PretrainedConfig):
    """Sizes of a residual network for small images whose norms come behind the convolutions.

    Args:
        block (`str`, *optional*, defaults to `"basic"`): What the stages consist of; one of `known_blocks`.
        depth (`int`, *optional*, defaults to 3): Blocks in each stage.
        widths (`list[int]`, *optional*, defaults to `(16, 32, 64)`): Channels of each stage. From the second one on,
            the first block of a stage halves height and width.
        stem_width (`int`, *optional*): Channels before the first stage; by default those of the first stage.
        padded_shortcut (`bool`, *optional*, defaults to `True`): Whether shortcuts that change sizes pad with zeros.
            Otherwise they are 1x1 convolutions.
        num_channels (`int`, *optional*, defaults to 3): Channels of an image.
        image_size (`int`, *optional*, defaults to 32): Height and width of the images that costs are counted for. The
            network takes images of any size.
        kwargs: Those of `PretrainedConfig`.

    Raises:
        ValueError: If there is no such block, or a size is not positive.
    """

    model_type = "cifar_resnet"
    known_blocks = ("basic",)

    def __init__(
        self,
        block: str = "basic",
        depth: int = 3,
        widths: tuple[int, ...] | list[int] = (16, 32, 64),
        stem_width: int | None = None,
        padded_shortcut: bool = True,
        num_channels: int = 3,
        image_size: int = 32,
        **kwargs: Any,
    ):
        if block not in self.known_blocks:
            choices = ", ".join(self.known_blocks)
            raise ValueError(f"{type(self).__name__} knows no block '{block}'; choose one of {choices}.")
        self.block, self.depth, self.widths = block, depth, list(widths)
        self.stem_width = self.widths[0] if stem_width is None else stem_width
        self.padded_shortcut, self.num_channels, self.image_size = padded_shortcut, num_channels, image_size
        if min(depth, self.stem_width, num_channels, *self.widths) < 1:
            raise ValueError(
                f"The sizes of a {type(self).__name__} must be positive, got depth={depth}, widths={self.widths}, "
                f"stem_width={self.stem_width}, num_channels={num_channels}."
            )
        super().__init__(**kwargs)


class CifarPreResNetConfig(CifarResNetConfig):
    """Sizes of a residual network for small images whose norms come before the convolutions.

    It is a type of its own, because other norms follow the same convolutions.

    Args:
        block (`str`, *optional*, defaults to `"bottleneck"`): `"bottleneck"` or `"preactivation"`.
        kwargs: Those of [`CifarResNetConfig`].
    """

    model_type = "cifar_preresnet"
    known_blocks = ("bottleneck", "preactivation")

    def __init__(self, block: str = "bottleneck", **kwargs: Any):
        super().__init__(block=block, **kwargs)


# The papers' networks by name. A network of 6n + 2 layers has n blocks of two convolutions in each of three stages.
CIFAR_NETWORKS: dict[str, dict[str, Any]] = {
    "resnet20": {"depth": 3},
    "resnet32": {"depth": 5},
    "resnet56": {"depth": 9},
    "preresnet29": {"block": "bottleneck", "widths": (64, 128, 256), "padded_shortcut": False},
    "wrn-32": {"depth": 5, "widths": (64, 128, 256), "padded_shortcut": False},
    "wrn-28-8": {
        "block": "preactivation",
        "depth": 4,
        "widths": (128, 256, 512),
        "stem_width": 16,
        "padded_shortcut": False,
    },
}


def cifar_config(name: str, **settings: Any) -> CifarResNetConfig:
    """Makes the config of one of the papers' networks.

    Args:
        name (`str`): One of `CIFAR_NETWORKS`.
        settings: Further settings of the config, such as `num_labels`.

    Raises:
        ValueError: If there is no such network.
    """
    if name not in CIFAR_NETWORKS:
        raise ValueError(f"There is no CIFAR network '{name}'; choose one of {', '.join(CIFAR_NETWORKS)}.")
    sizes = {**CIFAR_NETWORKS[name], **settings}
    return CifarPreResNetConfig(**sizes) if "block" in sizes else CifarResNetConfig(**sizes)
