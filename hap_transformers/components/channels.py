"""Channels as components: a filter of the convolution that writes them, and the inputs of the one that reads them.

Channels lie inside residual blocks. The width of the residual stream stays.
"""

from operator import attrgetter

from torch import nn
from transformers import PreTrainedModel

from .architectures import Architecture
from .convolutions import Convolution, GroupedConvolution, RunningNorm, Squeezed
from .groups import Group, Kind, layer_paths, register_kind
from .names import Chain, ChannelNames
from .pointwise import area_beyond_centre, set_pointwise, view_of
from .projections import Projection, without_adapter


NAME = "channels"

# What may lie between two convolutions, by class.
FOLLOWERS: dict[type[nn.Module], type[GroupedConvolution] | type[RunningNorm]] = {
    nn.BatchNorm2d: RunningNorm,
    nn.Conv2d: GroupedConvolution,
}


def find(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """Lists what lies between two convolutions of a residual block, first layer first.

    Every such chain counts as a layer of its own; a residual block may have several.

    Raises:
        ValueError: If the architecture's entry does not fit the model, or its modules were pruned in another one.
    """
    names: ChannelNames = architecture.names[NAME]
    groups: list[Group] = []
    for block, path in enumerate(layer_paths(model, architecture)):
        modules = model.base_model.get_submodule(path[:-1]).named_modules()
        inside = {name: without_adapter(module) for name, module in modules}
        chains = [chain for chain in names.chains if {chain.writer, chain.reader} <= inside.keys()]
        for chain in chains:
            group = _group(model, path, inside, chain, len(groups))
            if chain.writer not in {other.reader for other in chains}:
                group.of_stream = group.writers
            group.block = block
            if chain is chains[-1]:
                group.shortcut = inside.get(names.shortcut) if names.shortcut else None
                added = names.added is not None and attrgetter(names.added)(inside[""])
                group.alone = group.shortcut is None and not added
            else:
                group.alone = True
            groups.append(group)
    return groups


def _group(model: PreTrainedModel, path: str, inside: dict[str, nn.Module], chain: Chain, layer: int) -> Group:
    """The channels of a chain."""
    followers = [_follower(model, path + name, inside[name]) for name in chain.followers if name in inside]
    if chain.squeezed:
        means, factors = chain.squeezed
        followers += [Squeezed(path + means, inside[means]), Convolution(path + factors, inside[factors])]
    writer, reader = (_convolution(model, path + name, inside[name]) for name in (chain.writer, chain.reader))
    channels = reader.module.in_channels
    count = min([channels, *(p.module.groups for p in followers if isinstance(p, GroupedConvolution))])
    left = {projection.out_features for projection in (writer, *followers)}
    if left != {channels}:
        raise ValueError(
            f"'{reader.name}' of {type(model).__name__} reads {channels} channels, but '{writer.name}' and what lies "
            f"between give {sorted(left)}; the entry of '{model.config.model_type}' in "
            "hap_transformers.ARCHITECTURES does not fit this model."
        )
    kept, original = vars(reader.module).get("kept_channels", (range(count), count))
    if len(kept) != count:
        raise ValueError(
            f"'{reader.name}' of {type(model).__name__} reads {count} channels, but was left {len(kept)} by pruning. "
            "If a layer was changed after pruning, reload the model from its checkpoint."
        )
    group = Group(CHANNELS, layer, [writer], followers, [reader], list(kept), original, of_stream=[])
    if chain.norm in inside:
        group.norm = _norm(model, path + chain.norm, inside[chain.norm])
    if beyond := area_beyond_centre(writer.module):
        group.implantable, group.implant_saves = writer.module, beyond / (beyond + 1)
    return group


def _convolution(model: PreTrainedModel, name: str, module: nn.Module) -> Convolution:
    """The view of a writer or reader.

    Raises:
        ValueError: If it is no plain convolution.
    """
    if not isinstance(module, nn.Conv2d) or module.groups > 1:
        raise ValueError(
            f"'{name}' of {type(model).__name__} is no convolution of all channels (groups=1), so its channels cannot "
            "be removed one by one."
        )
    return view_of(name, module)


def _follower(model: PreTrainedModel, name: str, module: nn.Module) -> Projection:
    """The view of what lies between.

    Raises:
        ValueError: If it is nothing that acts on channels one by one, or a norm without weights or running statistics.
    """
    for stored, view in FOLLOWERS.items():
        if isinstance(module, stored):
            return _norm(model, name, module) if view is RunningNorm else view(name, module)
    raise ValueError(
        f"'{name}' of {type(model).__name__} is a {type(module).__name__}, which hap_transformers cannot shrink with "
        f"its channels; it can shrink {', '.join(stored.__name__ for stored in FOLLOWERS)}."
    )


def _norm(model: PreTrainedModel, name: str, module: nn.Module) -> RunningNorm:
    """The view of a norm.

    Raises:
        ValueError: If it lacks weights or running statistics.
    """
    if module.weight is None or module.running_mean is None:
        raise ValueError(
            f"'{name}' of {type(model).__name__} is a {type(module).__name__} without weights or running statistics "
            "(affine=True, track_running_stats=True), so it is no fixed map of each channel, which pruning needs."
        )
    return RunningNorm(name, module)


def fit(group: Group) -> None:
    """Notes which channels are left, and lets a chain without any compute nothing but what the reader's bias gives."""
    vars(group.reader.module)["kept_channels"] = list(group.kept), group.original
    if not group.num_components:
        for projection in (*group.writers, *group.followers):
            projection.empty(outputs=True)
        group.reader.empty(outputs=False)


CHANNELS = Kind(
    name=NAME,
    singular="channel",
    label="channels",
    find=find,
    fit=fit,
    floor=0.05,
    floor_is_share=True,
    step=1,
    keeps_numbers=True,
    implant=set_pointwise,
    linear_implants=False,
    implant_label="with a 1x1 filter, as implants",
    implant_needs="filters larger than 1x1 around a pixel in the convolution that writes it",
)
register_kind(CHANNELS)
