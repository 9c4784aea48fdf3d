"""Modules that do something else once their components are gone, where smaller weights alone are not enough.

Such a module takes on a subclass of its own class. It stays the same object with its hooks and state, and code that
recognises it by its class (recorders of attention maps, for example) still does.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import nn


_Arguments = ParamSpec("_Arguments")


def take_class(module: nn.Module, new_class: type[nn.Module]) -> None:
    """Changes the class of a module."""
    module.__class__ = new_class
    attributes = vars(module)
    # The old method may lie in the instance: Transformers 4 leaves it there when it has recorded attention maps,
    # accelerate keeps it for the hooks that move weights between devices. It may be compiled.
    old = attributes.get("forward")
    if getattr(getattr(old, "_torchdynamo_orig_callable", old), "__self__", None) is module:
        del module.forward
    if "_old_forward" in attributes:
        module._old_forward = new_class.forward.__get__(module)


def dense_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it took on another."""
    return getattr(type(module), "dense_class", type(module))


def argument_names(module_class: type[nn.Module]) -> list[str]:
    """Names of the arguments of a class's `forward`."""
    return list(inspect.signature(module_class.forward).parameters)[1:]


def subclass(
    prefix: str,
    base: type[nn.Module],
    forward: Callable[..., Any],
    factory: Callable[..., type[nn.Module]],
    *args: Any,
    **methods: Callable[..., Any],
) -> type[nn.Module]:
    """Makes the class that `factory(*args)` returns, whose modules are pickled by that call."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _new, (factory, args), self.__dict__

    attributes = {"forward": forward, "dense_class": base, "__reduce_ex__": __reduce_ex__, **methods}
    return type(prefix + base.__name__, (base,), attributes)


def cached(factory: Callable[_Arguments, type[nn.Module]]) -> Callable[_Arguments, type[nn.Module]]:
    """`functools.cache`, whose annotation forgets the arguments and does not accept classes as hashable."""
    return functools.cache(factory)  # type: ignore[return-value]


def empty_outputs(module: nn.Module) -> None:
    """Lets a projection without outputs compute no matrix product."""
    take_class(module, _without_outputs(dense_class(module)))


def empty_inputs(module: nn.Module) -> None:
    """Lets a projection without inputs compute no matrix product; it only adds its bias."""
    take_class(module, _without_inputs(dense_class(module)))


@cached
def _without_outputs(projection_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a projection without outputs."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[..., :0].clone()  # No view of the input, which adapters may change in place.

    return subclass("Empty", projection_class, forward, _without_outputs, projection_class)


@cached
def _without_inputs(projection_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a projection without inputs, of which the bias is left."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = self.weight.new_zeros(max(self.weight.shape)) if self.bias is None else self.bias
        # A trace is checked without gradients, and must find what it recorded with them.
        if not torch.is_grad_enabled() and not torch.jit.is_tracing():
            return bias.expand(*hidden_states.shape[:-1], -1).clone()  # One kernel, of what may be changed in place.
        # The sum of nothing keeps what comes before in the graph, as DistributedDataParallel requires.
        return hidden_states.sum(-1, keepdim=True) + bias

    return subclass("Empty", projection_class, forward, _without_inputs, projection_class)


def _new(factory: Callable[..., type[nn.Module]], args: tuple[Any, ...]) -> nn.Module:
    made = factory(*args)
    return made.__new__(made)
