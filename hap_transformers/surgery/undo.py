"""Puts a model back as it was, if pruning it fails."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy

import torch
from transformers import PretrainedConfig, PreTrainedModel


@contextmanager
def values_undone(tensors: Iterable[torch.Tensor], always: bool = False) -> Iterator[None]:
    """Restores the values of parameters and buffers, if what follows fails or is interrupted.

    Args:
        tensors (`Iterable[torch.Tensor]`): The parameters and buffers. A copy of each is kept meanwhile.
        always (`bool`, *optional*, defaults to `False`): Whether to restore them in any case.
    """
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    done = False
    try:
        yield
        done = not always
    finally:
        if not done:
            with torch.no_grad():
                for tensor, values in before:
                    tensor.copy_(values)


@contextmanager
def undone_on_error(model: PreTrainedModel, always: bool = False) -> Iterator[None]:
    """Restores a model's structure, if pruning it or what follows fails or is interrupted.

    Modules, parameters and configs are the same objects again, so that an optimizer made before still has them. Values
    that were written into the parameters themselves stay.

    Args:
        model (`PreTrainedModel`): The model.
        always (`bool`, *optional*, defaults to `False`): Whether to restore it in any case.
    """
    modules = {
        module: {name: (v, copy(v) if isinstance(v, dict) else None) for name, v in vars(module).items()}
        for module in model.modules()
    }
    classes = {module: type(module) for module in model.modules()}  # Emptied modules change their class.
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    configs, done = list(_configs(model.config)), False
    same = {id(config): config for config in configs}  # Those inside of others are not copied.
    fields = [deepcopy(vars(config), dict(same)) for config in configs]
    try:
        yield
        done = not always
    finally:
        if not done:
            for module, attributes in modules.items():
                vars(module).clear()
                for name, (value, content) in attributes.items():
                    if content is not None:  # The same dictionary again: hooks' handles know it.
                        value.clear()
                        value.update(content)
                    vars(module)[name] = value
                module.__class__ = classes[module]
            for parameter, required_before in required.items():
                parameter.requires_grad_(required_before)
            for config, before in zip(configs, fields, strict=True):
                vars(config).clear()
                vars(config).update(before)


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config, and those of the model's parts inside it."""
    yield config
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            yield from _configs(part)
