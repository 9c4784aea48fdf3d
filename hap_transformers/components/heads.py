"""Attention heads as components: rows of the query, key and value projections, and columns of the output projection.

With grouped-query attention a component is a key/value head with all its query heads.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import Architecture, HeadNames, config_of_layers, decoder_paths, named_layers
from .attention_forwards import choosing_bias, choosing_columns, choosing_heads, headless, of_own_width
from .groups import Group, Kind, empty_parameters, register_kind
from .projections import find_projections
from .subclasses import dense_class, empty_inputs, take_class


NAME = "heads"


def find(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """Lists a model's self-attention blocks, first layer first.

    Raises:
        ValueError: If the weights and `config.pruned_heads` contradict each other.
    """
    groups = find_whole(model, architecture)
    recorded = heads_gone(model.config)
    for group in groups:
        count = group.writers[1].out_features // group.head_size
        if count != group.original:
            group.kept = [head for head in group.kept if head not in recorded.get(group.layer, ())]
        if count != len(group.kept):
            raise ValueError(
                f"Layer {group.layer} of {type(model).__name__} has {count} heads, but config.pruned_heads leaves it "
                f"{len(group.kept)}. If config.pruned_heads was edited by hand, reload the model from its checkpoint. "
                "If a layer was swapped, moved or dropped after pruning, do that before pruning."
            )
    return groups


def find_whole(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """Lists a model's attention blocks as if they had all heads of the dense model, those of cross-attention last."""
    layers, of_decoder = named_layers(model, architecture, NAME), decoder_paths(model, architecture)
    found = [_whole(model, architecture, layers, layer) for layer in range(len(layers))]
    for group, (path, _) in zip(found, layers, strict=True):
        group.decoded = path in of_decoder
    if architecture.decoder is not None:
        layers += [(path, architecture.decoder.cross_heads) for path in of_decoder]
    for layer in range(len(found), len(layers)):
        group = _whole(model, architecture, layers, layer)
        # Keys and values read what the encoder gives.
        group.of_stream, group.decoded, group.block = group.writers[:1], True, layer - len(of_decoder)
        found.append(group)
    return found


def _whole(
    model: PreTrainedModel, architecture: Architecture, layers: Sequence[tuple[str, HeadNames]], layer: int
) -> Group:
    """One attention block, given the paths and names of all."""
    (path, names), config = layers[layer], config_of_layers(model, architecture)
    paths = [path for path, of_layer in layers if of_layer is names]
    queries, total = (
        _of_layer(getattr(config, name), path, paths) for name in (names.config_query_heads, names.config_heads)
    )
    writers = find_projections(model.base_model, path, (names.query, names.key, names.value))
    (reader,) = find_projections(model.base_model, path, (names.output,))
    followers = find_projections(model.base_model, path, names.position_inputs, optional=True)
    attention = model.base_model.get_submodule(path + names.attention)
    own = (writers, followers, [reader], list(range(total)), total, attention, names)
    head_size = getattr(config, names.config_head_size, None) or writers[0].in_features // queries
    around = model.base_model.get_submodule(path[:-1])
    group = Group(HEADS, layer, *own, head_size=head_size, shared=queries // total, around=around)
    # DeBERTa's queries and keys may be made of positions, too.
    group.of_stream, group.alone = writers[2:] if names.position_inputs else None, names.apart
    group.plain, parameters = names.config_heads, dict(around.named_parameters())
    group.scale, group.windowed = parameters.get(names.scale or ""), names.windowed
    return group


def _of_layer(number: int | Sequence[int], path: str, paths: Sequence[str]) -> int:
    """The number of a layer, given that of all layers or, by its place, that of the layers in each list."""
    lists = [own[:-1].rpartition(".")[0] for own in paths]
    places = list(dict.fromkeys(lists))
    return number if isinstance(number, int) else number[places.index(lists[paths.index(path)])]


def heads_gone(config: PretrainedConfig) -> dict[int, list[int]]:
    """For each layer, the numbers of the heads that `config.pruned_heads` records as gone."""
    return {int(layer): heads for layer, heads in (getattr(config, "pruned_heads", None) or {}).items()}


def dims_left(attention: nn.Module) -> dict[str, list[int]] | None:
    """Dimensions that are left of every head, by kind, if an attention module has lost any."""
    return vars(attention).get("dims_left")


def fit(group: Group) -> None:
    """Makes an attention module work with the heads that its projections hold."""
    fit_to_heads(group, group.kept)


def fit_to_heads(group: Group, kept: Sequence[int], sizes: Mapping[str, int] = {}) -> None:
    """Makes an attention module work with some heads.

    Args:
        group (`Group`): The heads of its layer, whose projections have lost the others.
        kept (`Sequence[int]`): Numbers of the heads.
        sizes (`Mapping[str, int]`, *optional*): Other attributes of the module to set, if it has them.
    """
    attention, names, reader = group.core, group.names, group.reader
    assert attention is not None
    sizes = {names.num_heads: len(kept), names.width: reader.in_features, **sizes}
    for name in sizes.keys() & vars(attention).keys():
        setattr(attention, name, sizes[name])
    dense = dense_class(attention)
    if not kept:
        output, norm = _inside(names, names.output), _inside(names, names.attention_norm)
        take_class(attention, headless(dense, output, norm, names.position_bias))
        empty_inputs(reader.module)
        return
    if names.position_bias:
        vars(attention)["kept_heads"] = list(kept)
    if names.position_bias == "table":
        take_class(attention, choosing_columns(dense, names.bias_argument))
    elif names.position_bias:
        take_class(attention, choosing_bias(dense, names.position_bias, names.bias_argument))
    if names.width_of_input:
        paths = (names.query, names.key, names.value)
        own = tuple(path.removeprefix(f"{names.attention}.") for path in paths)
        take_class(attention, of_own_width(dense, own))
    for module in _position_modules(group, inside=True):
        vars(module)["kept_heads"] = list(kept)
        take_class(module, choosing_heads(dense_class(module)))


def _position_modules(group: Group, inside: bool = False) -> list[nn.Module]:
    """The modules that give a layer's own position bias, or those of them that lie in its attention module."""
    assert group.around is not None
    modules = dict(group.around.named_modules())
    paths = [path for path in group.names.position_modules if path in modules]
    return [modules[path] for path in paths if not inside or _inside(group.names, path)]


def idle(group: Group) -> set[torch.Tensor]:
    """Parameters that an attention module without heads does not use."""
    attention, names = group.core, group.names
    assert attention is not None
    unused = empty_parameters(group)
    unused |= {parameter for module in _position_modules(group) for parameter in module.parameters()}
    if names.position_bias != "computed":  # Else the module may still compute the position bias of other layers.
        paths = [_inside(names, path) for path in (names.output, names.attention_norm)]
        used = [parameter for path in paths if path for parameter in attention.get_submodule(path).parameters()]
        unused |= set(attention.parameters()) - set(used)
    return unused


def _inside(names: HeadNames, path: str | None) -> str | None:
    """A path from the attention module instead of from the layer; `None` if it leads elsewhere."""
    root = names.attention + "."
    return path.removeprefix(root) if path and path.startswith(root) else None


def write_plain(config: PretrainedConfig, group: Group, count: int) -> None:
    """Writes the heads of all layers into a config, and their size, which is no longer hidden size / heads."""
    setattr(config, group.names.config_query_heads, count * group.shared)
    setattr(config, group.plain, count)
    setattr(config, group.names.config_head_size, group.head_size)


HEADS = Kind(
    name=NAME,
    singular="head",
    label="attention heads",
    find=find,
    fit=fit,
    floor=1,
    floor_is_share=False,
    keeps_numbers=True,
    write_plain=write_plain,
    idle=idle,
)
register_kind(HEADS)
