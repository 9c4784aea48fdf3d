"""Attention heads as components: rows of the query, key and value projections, and columns of the output projection.

With grouped-query attention a component is a key/value head with all its query heads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from .architectures import Architecture, HeadNames, config_of_layers
from .groups import Group, Kind, empty_parameters, layer_paths, register_kind
from .projections import find_projections
from .releases import TRANSFORMERS_4
from .spreading import set_and_hand_on
from .subclasses import argument_names, cached, dense_class, empty_inputs, subclass, take_class


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
    """Lists a model's self-attention blocks as if they had all heads of the dense model."""
    names, config, groups = architecture.names[NAME], config_of_layers(model, architecture), []
    paths = layer_paths(model, architecture)
    per_layer = zip(
        _of_layers(config.num_attention_heads, paths),
        _of_layers(getattr(config, names.config_heads), paths),
        strict=True,
    )
    for layer, (path, (queries, total)) in enumerate(zip(paths, per_layer, strict=True)):
        writers = find_projections(model.base_model, path, (names.query, names.key, names.value))
        (reader,) = find_projections(model.base_model, path, (names.output,))
        followers = find_projections(model.base_model, path, names.position_inputs, optional=True)
        attention = model.base_model.get_submodule(path + names.attention)
        own = (writers, followers, [reader], list(range(total)), total, attention, names)
        head_size = getattr(config, names.config_head_size, None) or writers[0].in_features // queries
        # DeBERTa's queries and keys may be made of positions, too.
        of_stream = writers[2:] if names.position_inputs else None
        around = model.base_model.get_submodule(path[:-1])
        group = Group(HEADS, layer, *own, head_size=head_size, shared=queries // total, around=around)
        group.of_stream, group.alone = of_stream, names.apart
        parameters = dict(around.named_parameters())
        group.scale, group.windowed = parameters.get(names.scale or ""), names.windowed
        groups.append(group)
    return groups


def _of_layers(number: int | Sequence[int], paths: Sequence[str]) -> list[int]:
    """The number of every layer, given that of all layers or, by its place, that of the layers in each list."""
    lists = [path[:-1].rpartition(".")[0] for path in paths]
    places = {name: place for place, name in enumerate(dict.fromkeys(lists))}
    return [number if isinstance(number, int) else number[places[name]] for name in lists]


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
        take_class(attention, _headless(dense, output, norm, names.position_bias))
        empty_inputs(reader.module)
        return
    if names.position_bias:
        vars(attention)["kept_heads"] = list(kept)
    if names.position_bias == "table":
        take_class(attention, _choosing_columns(dense, names.bias_argument))
    elif names.position_bias:
        take_class(attention, _choosing_bias(dense, names.position_bias, names.bias_argument))
    if names.width_of_input:
        paths = (names.query, names.key, names.value)
        own = tuple(path.removeprefix(f"{names.attention}.") for path in paths)
        take_class(attention, _of_own_width(dense, own))
    for module in _position_modules(group, inside=True):
        vars(module)["kept_heads"] = list(kept)
        take_class(module, _choosing_heads(dense_class(module)))


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


@cached
def _headless(
    attention_class: type[nn.Module], output: str | None, norm: str | None, position_bias: str | None
) -> type[nn.Module]:
    """Subclasses an attention class so that it computes no attention.

    Args:
        attention_class (`type[nn.Module]`): The class of the attention module.
        output (`str`, *optional*): Path of the output projection in the module, where it lies inside.
        norm (`str`, *optional*): Path of the LayerNorm of the sum of input and output, where it lies inside.
        position_bias (`str`, *optional*): See [`HeadNames`].
    """
    names = argument_names(attention_class)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        hidden_states = arguments[names[0]]
        cache = arguments.get("past_key_values")
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            # Models read the number of tokens seen so far from a layer's cache.
            placeholder = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            position = ({"cache_position": arguments.get("cache_position")},) if TRANSFORMERS_4 else ()
            cache.update(placeholder, placeholder, self.layer_idx, *position)
        result = hidden_states[..., :0].clone()
        if output is not None:
            result = self.get_submodule(output)(result)
        if norm is not None:
            result = self.get_submodule(norm)(hidden_states + result)
        length = hidden_states.shape[-2]
        attentions = hidden_states.new_zeros(*hidden_states.shape[:-2], 0, length, length)
        if position_bias == "computed":
            return result, _position_bias(self, arguments), attentions
        return result, attentions

    return subclass("Headless", attention_class, forward, _headless, attention_class, output, norm, position_bias)


@cached
def _choosing_bias(attention_class: type[nn.Module], position_bias: str, argument: str) -> type[nn.Module]:
    """Subclasses an attention class so that it takes its own heads out of the dense model's position bias."""
    names = argument_names(attention_class)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        bias: Any = _position_bias(self, arguments) if position_bias == "computed" else arguments.get(argument)
        of_dense = bias is not None and bias.shape[1] > len(self.kept_heads)
        chosen = bias[:, self.kept_heads] if of_dense else bias  # Others are masks.
        outputs = attention_class.forward(self, **{**arguments, argument: chosen})
        return (outputs[0], bias, *outputs[2:]) if position_bias == "computed" else outputs

    method = {"__setattr__": set_and_hand_on}
    return subclass(
        "Pruned", attention_class, forward, _choosing_bias, attention_class, position_bias, argument, **method
    )


@cached
def _choosing_heads(module_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a module that gives a position bias so that it gives those of some heads."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return module_class.forward(self, *args, **kwargs)[:, self.kept_heads]

    return subclass("Pruned", module_class, forward, _choosing_heads, module_class)


@cached
def _of_own_width(attention_class: type[nn.Module], projections: tuple[str, ...]) -> type[nn.Module]:
    """Subclasses an attention class that takes the width of its heads for that of its input.

    Args:
        attention_class (`type[nn.Module]`): The class of the attention module.
        projections (`tuple[str, ...]`): Its query, key and value projections.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        given = {name: getattr(self, name)(hidden_states) for name in projections}
        # Another object with the same modules, so that threads do not see each other's tensors.
        view = attention_class.__new__(attention_class)
        vars(view).update(vars(self), **{name: lambda _, own=own: own for name, own in given.items()})
        return attention_class.forward(view, given[projections[-1]], *args, **kwargs)

    method = {"__setattr__": set_and_hand_on}
    return subclass("Pruned", attention_class, forward, _of_own_width, attention_class, projections, **method)


@cached
def _choosing_columns(attention_class: type[nn.Module], table: str) -> type[nn.Module]:
    """Subclasses an attention class so that it takes its own heads out of the dense model's table."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        # Another object with the same modules, so that threads do not see each other's columns.
        view = attention_class.__new__(attention_class)
        columns = self._parameters[table][:, self.kept_heads]
        vars(view).update(vars(self), _parameters={**self._parameters, table: columns})
        return attention_class.forward(view, *args, **kwargs)

    method = {"__setattr__": set_and_hand_on}
    return subclass("Pruned", attention_class, forward, _choosing_columns, attention_class, table, **method)


def _position_bias(attention: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The bias of all heads of the dense model, which the first layer of T5 computes."""
    if arguments.get("position_bias") is not None:
        return arguments["position_bias"]
    length, mask = arguments["hidden_states"].shape[1], arguments.get("mask")
    bias = attention.compute_bias(length, length, device=arguments["hidden_states"].device)
    return bias + mask[..., :length] if TRANSFORMERS_4 and mask is not None else bias


def write_plain(config: PretrainedConfig, group: Group, count: int) -> None:
    """Writes the heads of all layers into a config, and their size, which is no longer hidden size / heads."""
    config.num_attention_heads = count * group.shared
    setattr(config, group.names.config_heads, count)
    setattr(config, group.names.config_head_size, group.head_size)
    config.pruned_heads = {}


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
