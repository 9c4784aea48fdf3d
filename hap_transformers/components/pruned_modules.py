"""What modules must do differently once their components are gone, where smaller weights alone are not enough.

Such a module takes on a subclass of its own class: it stays the same object with its hooks and state, and whatever
recognises it by its class (recorders of attention maps, say) still does.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache

from .groups import AttentionBlock, Block, FeedForwardBlock
from .releases import TRANSFORMERS_4


_Arguments = ParamSpec("_Arguments")


def fit_modules(block: Block) -> None:
    """Makes a block's modules work with the components that its projections hold."""
    empty = block.num_components == 0
    if isinstance(block, AttentionBlock):
        _fit_attention(block)
    elif empty:
        for module in {projection.module for projection in block.inputs}:
            _take_class(module, _without_outputs(_dense_class(module)))
    if empty:
        _take_class(block.output.module, _without_inputs(_dense_class(block.output.module)))
    freeze_idle_parameters(block)


def set_implant_rank(block: FeedForwardBlock, rank: int) -> None:
    """Makes the last `rank` neurons of a block linear: their activations are what they read.

    In a gated block the gate that goes through the activation becomes 1 for them.
    """
    activation = block.activation
    assert activation is not None  # Callers have refused architectures whose activation is not known.
    vars(activation)["implant_rank"] = rank
    activation_class = _dense_class(activation)
    _take_class(activation, _with_implant(activation_class, len(block.inputs) > 1) if rank else activation_class)


def freeze_idle_parameters(block: Block) -> None:
    """Lets parameters require no gradients that a block without components does not use.

    DistributedDataParallel would wait for their gradients.
    """
    if block.num_components:
        return
    idle = {p for projection in block.sliced for p in projection.parameters if p.numel() == 0}
    if isinstance(block, AttentionBlock) and block.architecture.position_bias is None:
        # Where there is a position bias, the module may compute that of other layers still.
        paths = [_inside(block, path) for path in (block.architecture.output, block.architecture.attention_norm)]
        used = [parameter for path in paths if path for parameter in block.attention.get_submodule(path).parameters()]
        idle |= set(block.attention.parameters()) - set(used)
    for parameter in idle:
        parameter.requires_grad_(False)


def _fit_attention(block: AttentionBlock) -> None:
    attention, architecture = block.attention, block.architecture
    sizes = {architecture.num_heads: block.num_components, architecture.width: block.output.in_features}
    for name in sizes.keys() & vars(attention).keys():
        setattr(attention, name, sizes[name])
    dense_class = _dense_class(attention)
    if block.num_components == 0:
        output, norm = _inside(block, architecture.output), _inside(block, architecture.attention_norm)
        _take_class(attention, _headless(dense_class, output, norm, architecture.position_bias))
    elif architecture.position_bias:
        vars(attention)["kept_heads"] = block.kept_heads
        _take_class(attention, _choosing_bias(dense_class, architecture.position_bias))


def _take_class(module: nn.Module, new_class: type[nn.Module]) -> None:
    module.__class__ = new_class
    attributes = vars(module)
    # The old method may lie in the instance: Transformers 4 leaves it there when it has recorded attention maps,
    # accelerate keeps it for the hooks that move weights between devices.
    if getattr(attributes.get("forward"), "__self__", None) is module:
        del module.forward
    if "_old_forward" in attributes:
        module._old_forward = new_class.forward.__get__(module)


def _dense_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "dense_class", type(module))


def _inside(block: AttentionBlock, path: str | None) -> str | None:
    """A path from the attention module instead of from the layer; `None` if it leads elsewhere."""
    root = block.architecture.attention + "."
    return path.removeprefix(root) if path and path.startswith(root) else None


def _cached(factory: Callable[_Arguments, type[nn.Module]]) -> Callable[_Arguments, type[nn.Module]]:
    """`functools.cache`, whose annotation forgets what arguments there are and takes no classes for hashable."""
    return functools.cache(factory)  # type: ignore[return-value]


@_cached
def _without_outputs(projection_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a projection without outputs."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[..., :0]

    return _subclass("Empty", projection_class, forward, _without_outputs, projection_class)


@_cached
def _without_inputs(projection_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a projection without inputs, of which the bias is left."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # The sum of nothing keeps what comes before in the graph, as DistributedDataParallel wants.
        bias = self.weight.new_zeros(max(self.weight.shape)) if self.bias is None else self.bias
        return hidden_states.sum(-1, keepdim=True) + bias

    return _subclass("Empty", projection_class, forward, _without_inputs, projection_class)


@_cached
def _with_implant(activation_class: type[nn.Module], gated: bool) -> type[nn.Module]:
    """Subclasses an activation so that its last `implant_rank` features are left as they are, or, gated, become 1."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        neurons = hidden_states.shape[-1] - self.implant_rank
        linear = hidden_states[..., neurons:]
        if gated:
            linear = torch.ones_like(linear)
        return torch.cat([activation_class.forward(self, hidden_states[..., :neurons]), linear], -1)

    return _subclass("Implanted", activation_class, forward, _with_implant, activation_class, gated)


@_cached
def _headless(
    attention_class: type[nn.Module], output: str | None, norm: str | None, position_bias: str | None
) -> type[nn.Module]:
    """Subclasses an attention class so that it computes no attention.

    Args:
        attention_class (`type[nn.Module]`): The class of the attention module.
        output (`str`, *optional*): Path of the output projection in the module, where it lies inside.
        norm (`str`, *optional*): Path of the LayerNorm of the sum of input and output, where it lies inside.
        position_bias (`str`, *optional*): See [`Architecture`].
    """
    names = _argument_names(attention_class)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        hidden_states = arguments[names[0]]
        cache = arguments.get("past_key_values")
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if cache is not None:
            # Models read the number of tokens seen so far off a layer's cache.
            placeholder = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            position = ({"cache_position": arguments.get("cache_position")},) if TRANSFORMERS_4 else ()
            cache.update(placeholder, placeholder, self.layer_idx, *position)
        result = hidden_states[..., :0]
        if output is not None:
            result = self.get_submodule(output)(result)
        if norm is not None:
            result = self.get_submodule(norm)(hidden_states + result)
        length = hidden_states.shape[-2]
        attentions = hidden_states.new_zeros(*hidden_states.shape[:-2], 0, length, length)
        if position_bias == "computed":
            return result, _position_bias(self, arguments), attentions
        return result, attentions

    return _subclass("Headless", attention_class, forward, _headless, attention_class, output, norm, position_bias)


@_cached
def _choosing_bias(attention_class: type[nn.Module], position_bias: str) -> type[nn.Module]:
    """Subclasses an attention class so that it takes its own heads out of the dense model's position bias."""
    names = _argument_names(attention_class)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        bias = _position_bias(self, arguments)
        outputs = attention_class.forward(self, **{**arguments, "position_bias": bias[:, self.kept_heads]})
        return (outputs[0], bias, *outputs[2:]) if position_bias == "computed" else outputs

    return _subclass("Pruned", attention_class, forward, _choosing_bias, attention_class, position_bias)


def _position_bias(attention: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The bias of all heads of the dense model, which the first layer of T5 computes."""
    if arguments.get("position_bias") is not None:
        return arguments["position_bias"]
    length, mask = arguments["hidden_states"].shape[1], arguments.get("mask")
    bias = attention.compute_bias(length, length, device=arguments["hidden_states"].device)
    return bias + mask[..., :length] if TRANSFORMERS_4 and mask is not None else bias


def _argument_names(attention_class: type[nn.Module]) -> list[str]:
    return list(inspect.signature(attention_class.forward).parameters)[1:]


def _subclass(
    prefix: str,
    dense_class: type[nn.Module],
    forward: Callable[..., Any],
    factory: Callable[..., type[nn.Module]],
    *args: Any,
) -> type[nn.Module]:
    """Makes the class that `factory(*args)` returns, whose modules are pickled by that call."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _new, (factory, args), self.__dict__

    attributes = {"forward": forward, "dense_class": dense_class, "__reduce_ex__": __reduce_ex__}
    return type(prefix + dense_class.__name__, (dense_class,), attributes)


def _new(factory: Callable[..., type[nn.Module]], args: tuple[Any, ...]) -> nn.Module:
    made = factory(*args)
    return made.__new__(made)
