"""How the architecture table names the convolutions that channels own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chain:
    """Channels between two convolutions of a layer. All paths start at the layer.

    Args:
        writer (`str`): The convolution whose filters the channels are.
        reader (`str`): The convolution that reads them.
        followers (`tuple[str, ...]`, *optional*): Modules between the two that act on every channel, or every run of
            channels, for itself: norms with running statistics, and grouped convolutions.
        norm (`str`, *optional*): The norm with running statistics of what the reader gives.
    """

    writer: str
    reader: str
    followers: tuple[str, ...] = ()
    norm: str | None = None


@dataclass(frozen=True)
class ChannelNames:
    """Names of the modules that channels own. All paths start at a layer.

    Args:
        chains (`tuple[Chain, ...]`): In the order in which a layer runs them. Those are skipped whose writer or reader
            the layer does not have.
        shortcut (`str`, *optional*): The module that gives what the last reader's block is added to, `nn.Identity`
            where this is the layer's input. Without it, or in a layer that does not have it, nothing is added.
    """

    chains: tuple[Chain, ...]
    shortcut: str | None = None
