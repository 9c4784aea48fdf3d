"""What attention modules compute once heads are gone, where smaller projections alone are not enough."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache

from .releases import TRANSFORMERS_4
from .spreading import set_and_hand_on
from .subclasses import argument_names, cached, subclass


@cached
def headless(
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
        hidden_states, memory = arguments[names[0]], arguments.get("key_value_states")
        seen, total = 0, (hidden_states if memory is None else memory).shape[-2]
        cache = arguments.get("past_key_values") if memory is None else None
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            # Models read the number of tokens seen so far from a layer's cache.
            placeholder = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            position = ({"cache_position": arguments.get("cache_position")},) if TRANSFORMERS_4 else ()
            seen = cache.get_seq_length(self.layer_idx) + 0  # A static cache counts on in the same tensor.
            total = cache.update(placeholder, placeholder, self.layer_idx, *position)[0].shape[-2]
        elif memory is not None:
            _fill_cross_cache(self.layer_idx, arguments.get("past_key_values"), memory)
        result = hidden_states[..., :0].clone()
        if output is not None:
            result = self.get_submodule(output)(result)
        if norm is not None:
            result = self.get_submodule(norm)(hidden_states + result)
        attentions = hidden_states.new_zeros(*hidden_states.shape[:-2], 0, hidden_states.shape[-2], total)
        if position_bias in ("computed", "alike"):
            maps = () if TRANSFORMERS_4 and not arguments.get("output_attentions") else (attentions,)
            return result, _position_bias(self, arguments, total, seen), *maps
        return result, attentions

    return subclass("Headless", attention_class, forward, headless, attention_class, output, norm, position_bias)


def _fill_cross_cache(layer: int, cache: Any, memory: torch.Tensor) -> None:
    """Gives a cross-attention's cache a placeholder, once a generation: Whisper indexes the keys of every layer."""
    if not isinstance(cache, EncoderDecoderCache) or cache.is_updated.get(layer):
        return
    placeholder = memory.new_zeros(memory.shape[0], 1, memory.shape[-2], 1)
    position = ({"cache_position": None},) if TRANSFORMERS_4 else ()
    cache.cross_attention_cache.update(placeholder, placeholder, layer, *position)
    cache.is_updated[layer] = True


@cached
def choosing_bias(attention_class: type[nn.Module], position_bias: str, argument: str) -> type[nn.Module]:
    """Subclasses an attention class so that it takes its own heads out of the dense model's position bias."""
    names = argument_names(attention_class)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        bias: Any = arguments.get(argument)
        if bias is None and position_bias == "computed":
            return _computing_bias(self, attention_class, arguments)
        of_dense = bias is not None and bias.shape[1] > len(self.kept_heads)
        chosen = bias[:, self.kept_heads] if of_dense else bias  # Others are masks.
        outputs = attention_class.forward(self, **{**arguments, argument: chosen})
        return (outputs[0], bias, *outputs[2:]) if position_bias == "computed" else outputs

    def forward_alike(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        bias: Any = arguments.get(argument)
        given = bias if bias is None else bias[:, :1]
        result, bias, *rest = attention_class.forward(self, **{**arguments, argument: given})
        return result, bias[:, :1], *rest

    method = {"__setattr__": set_and_hand_on}
    own = forward_alike if position_bias == "alike" else forward
    return subclass("Pruned", attention_class, own, choosing_bias, attention_class, position_bias, argument, **method)


def _computing_bias(
    attention: Any, attention_class: type[nn.Module], arguments: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """What an attention module gives that computes the bias of all heads of the dense model, and uses its own."""
    computed: list[torch.Tensor] = []

    def compute_bias(*args: Any, **kwargs: Any) -> torch.Tensor:
        computed.append(attention_class.compute_bias(attention, *args, **kwargs))  # type: ignore[attr-defined]
        return computed[0][:, attention.kept_heads]

    # Another object with the same modules, so that threads do not see each other's tensors.
    view = attention_class.__new__(attention_class)
    vars(view).update(vars(attention), compute_bias=compute_bias)
    outputs = attention_class.forward(view, **arguments)
    return outputs[0], _masked_bias(computed[0], arguments), *outputs[2:]


@cached
def choosing_heads(module_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a module that gives a position bias so that it gives those of some heads."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return module_class.forward(self, *args, **kwargs)[:, self.kept_heads]

    return subclass("Pruned", module_class, forward, choosing_heads, module_class)


@cached
def of_own_width(attention_class: type[nn.Module], projections: tuple[str, ...]) -> type[nn.Module]:
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
    return subclass("Pruned", attention_class, forward, of_own_width, attention_class, projections, **method)


@cached
def choosing_columns(attention_class: type[nn.Module], table: str) -> type[nn.Module]:
    """Subclasses an attention class so that it takes its own heads out of the dense model's table."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        # Another object with the same modules, so that threads do not see each other's columns.
        view = attention_class.__new__(attention_class)
        columns = self._parameters[table][:, self.kept_heads]
        vars(view).update(vars(self), _parameters={**self._parameters, table: columns})
        return attention_class.forward(view, *args, **kwargs)

    method = {"__setattr__": set_and_hand_on}
    return subclass("Pruned", attention_class, forward, choosing_columns, attention_class, table, **method)


def _position_bias(attention: Any, arguments: dict[str, Any], total: int, seen: int) -> torch.Tensor:
    """The bias of all heads of the dense model, which the first layer of T5 computes; one if they have the same.

    Args:
        attention (`Any`): The attention module.
        arguments (`dict[str, Any]`): Those of its forward.
        total (`int`): Number of keys.
        seen (`int`): Number of tokens before the first query.
    """
    if arguments.get("position_bias") is not None:
        return arguments["position_bias"]
    hidden_states = arguments["hidden_states"]
    length = hidden_states.shape[1]
    if not attention.has_relative_attention_bias:
        return _masked_bias(hidden_states.new_zeros(1, 1, length, total), arguments)
    where = {"cache_position": arguments.get("cache_position")} if TRANSFORMERS_4 else {"past_seen_tokens": seen}
    return _masked_bias(attention.compute_bias(length, total, device=hidden_states.device, **where), arguments)


def _masked_bias(bias: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """The bias that all layers add, which in Transformers 4 has the mask in it."""
    mask = arguments.get("mask")
    if not TRANSFORMERS_4 or mask is None:
        return bias
    return bias[:, :, -arguments["hidden_states"].shape[1] :] + mask[..., : bias.shape[-1]]
