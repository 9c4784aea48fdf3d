"""What modules must do differently once their components are gone, where smaller weights alone are not enough.

Such a module takes on a subclass of its own class: it stays the same object with its hooks and state, and whatever
recognises it by its class (recorders of attention maps, say) still does.
"""

import functools
import inspect
from typing import Any

import torch
from torch import nn

from .blocks import AttentionBlock, Block
from .releases import TRANSFORMERS_4


def fit_modules(block: Block) -> None:
    """Makes a block's modules work with the components that its projections hold."""
    empty = block.num_components == 0
    if isinstance(block, AttentionBlock):
        _fit_attention(block)
    elif empty:
        for projection in block.inputs:
            projection.module.__class__ = _without_outputs(type(projection.module))
    if empty:
        block.output.module.__class__ = _without_inputs(type(block.output.module))
    freeze_idle_parameters(block)


def freeze_idle_parameters(block: Block) -> None:
    """Lets parameters require no gradients that a block without components does not use.

    DistributedDataParallel would wait for their gradients.
    """
    if block.num_components:
        return
    idle = {p for projection in block.sliced for p in projection.parameters if p.numel() == 0}
    if isinstance(block, AttentionBlock) and block.architecture.position_bias is None:
        # Where there is a position bias, the module may compute that of other layers still.
        used = [_inside(block, path) for path in (block.architecture.output, block.architecture.attention_norm)]
        used = [parameter for path in used if path for parameter in block.attention.get_submodule(path).parameters()]
        idle |= set(block.attention.parameters()) - set(used)
    for parameter in idle:
        parameter.requires_grad_(False)


def _fit_attention(block: AttentionBlock) -> None:
    attention, architecture = block.attention, block.architecture
    sizes = {architecture.num_heads: block.num_components, architecture.width: block.output.in_features}
    for name in sizes.keys() & vars(attention).keys():
        setattr(attention, name, sizes[name])
    dense_class = getattr(type(attention), "dense_class", type(attention))
    if block.num_components == 0:
        output, norm = _inside(block, architecture.output), _inside(block, architecture.attention_norm)
        attention.__class__ = _headless(dense_class, output, norm, architecture.position_bias)
    elif architecture.position_bias:
        attention.kept_heads = block.kept_heads
        attention.__class__ = _choosing_bias(dense_class, architecture.position_bias)


def _inside(block: AttentionBlock, path: str | None) -> str | None:
    """A path from the attention module instead of from the layer; `None` if it leads elsewhere."""
    root = block.architecture.attention + "."
    return path.removeprefix(root) if path and path.startswith(root) else None


@functools.cache
def _without_outputs(projection_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a projection without outputs."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[..., :0]

    return _subclass("Empty", projection_class, forward)


@functools.cache
def _without_inputs(projection_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a projection without inputs, of which the bias is left."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # The sum of nothing keeps what comes before in the graph, as DistributedDataParallel wants.
        bias = self.weight.new_zeros(max(self.weight.shape)) if self.bias is None else self.bias
        return hidden_states.sum(-1, keepdim=True) + bias

    return _subclass("Empty", projection_class, forward)


@functools.cache
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
        if cache is not None:
            # Models read the number of tokens seen so far off a layer's cache.
            placeholder = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(placeholder, placeholder, self.layer_idx)
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

    return _subclass("Headless", attention_class, forward)


@functools.cache
def _choosing_bias(attention_class: type[nn.Module], position_bias: str) -> type[nn.Module]:
    """Subclasses an attention class so that it takes its own heads out of the dense model's position bias."""
    names = _argument_names(attention_class)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        bias = _position_bias(self, arguments)
        outputs = attention_class.forward(self, **{**arguments, "position_bias": bias[:, self.kept_heads]})
        return (outputs[0], bias, *outputs[2:]) if position_bias == "computed" else outputs

    return _subclass("Pruned", attention_class, forward)


def _position_bias(attention: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """The bias of all heads of the dense model, which the first layer of T5 computes."""
    if arguments.get("position_bias") is not None:
        return arguments["position_bias"]
    length, mask = arguments["hidden_states"].shape[1], arguments.get("mask")
    bias = attention.compute_bias(length, length, device=arguments["hidden_states"].device)
    return bias + mask[..., :length] if TRANSFORMERS_4 and mask is not None else bias


def _argument_names(attention_class: type[nn.Module]) -> list[str]:
    return list(inspect.signature(attention_class.forward).parameters)[1:]


def _subclass(prefix: str, dense_class: type[nn.Module], forward: Any) -> type[nn.Module]:
    return type(prefix + dense_class.__name__, (dense_class,), {"forward": forward, "dense_class": dense_class})
