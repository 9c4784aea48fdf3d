"""Puts a model back as it was, if pruning it fails."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy

import torch
from transformers import PreTrainedModel


@contextmanager
def values_undone(parameters: Iterable[torch.Tensor], always: bool = False) -> Iterator[None]:
    """Restores the values of parameters, if what follows fails or is interrupted.

    Args:
        parameters (`Iterable[torch.Tensor]`): The parameters. A copy of each is kept meanwhile.
        always (`bool`, *optional*, defaults to `False`): Whether to restore them in any case.
    """
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]
    done = False
    try:
        yield
        done = not always
    finally:
        if not done:
            with torch.no_grad():
                for parameter, values in before:
                    parameter.copy_(values)


@contextmanager
def undone_on_error(model: PreTrainedModel, always: bool = False) -> Iterator[None]:
    """Restores a model's structure, if pruning it or what follows fails or is interrupted.

    Modules and parameters are the same objects again, so that an optimizer made before still has them. Values that
    were written into the parameters themselves stay.

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
    config, done = deepcopy(vars(model.config)), False
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
            vars(model.config).clear()
            vars(model.config).update(config)
