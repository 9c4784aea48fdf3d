"""Cuts a model down to some ids: embeddings, output heads, their biases, and the ids in its configs."""

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .ids import Renumber, ids_in_fields, renumber_fields


# Attributes of modules that say how many ids there are.
SIZES = ("num_embeddings", "out_features", "vocab_size")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config that has the size of the vocabulary: the model's, or the one of its part that reads text.

    Raises:
        ValueError: If there is none, or several, or one with a second vocabulary.
    """
    parts = [part for part in vars(config).values() if isinstance(part, PretrainedConfig)]
    owners = [part for part in (config, *parts) if "vocab_size" in vars(part)]
    if len(owners) != 1:
        raise ValueError(
            f"The config of a '{config.model_type}' has {len(owners)} vocabularies; only models with one can be "
            "trimmed. Trim the models that it consists of. Nothing was changed."
        )
    (owner,) = owners
    sizes = {name for name, value in vars(owner).items() if "vocab_size" in name and value is not None}
    if others := {name for name in sizes if not name.startswith("type_")} - {"vocab_size"}:
        raise ValueError(
            f"The config of a '{config.model_type}' has a second vocabulary, {', '.join(sorted(others))}; only models "
            "with one can be trimmed. Nothing was changed."
        )
    return owner


def vocabulary_tensors(model: PreTrainedModel) -> dict[str, int]:
    """The parameters and buffers whose size is that of the vocabulary, by path, and which of their dimensions it is.

    A checkpoint is loaded into what the model's class builds from the config. So these are the tensors whose shape
    differs between two models, built without memory, whose `vocab_size` differs by one.

    Raises:
        ValueError: If the class cannot build such a model, or one of the tensors is not an ordinary one in memory.
    """
    name, size = type(model).__name__, text_config(model.config).vocab_size
    small, large = (_shapes(model, size + more) for more in (0, 1))
    dims = {
        path: next(dim for dim, length in enumerate(shape) if large[path][dim] != length)
        for path, shape in small.items()
        if large[path] != shape
    }
    if not dims:
        raise ValueError(f"No tensor of {name} has the size config.vocab_size. Nothing was changed.")
    tensors = dict(_tensors(model))
    for path, dim in dims.items():
        tensor = tensors.get(path)
        if tensor is None or type(tensor.data) is not torch.Tensor or not tensor.is_floating_point():
            raise ValueError(
                f"'{path}' of this {name} is not an ordinary tensor. Trim the vocabulary before quantizing or adding "
                "adapters to embeddings, or merge adapters first. Nothing was changed."
            )
        if tensor.is_meta or tensor.shape[dim] != size:
            where = "is not in memory" if tensor.is_meta else f"has the shape {list(tensor.shape)}"
            raise ValueError(
                f"'{path}' of this {name} {where}, and its config has a vocab_size of {size}. Load the whole model on "
                "one device, and resize it with model.resize_token_embeddings. Nothing was changed."
            )
    _validate_all_found(model, dims)
    return dims


def _shapes(model: PreTrainedModel, size: int) -> dict[str, torch.Size]:
    """Shapes of what a model's class builds from its config, with a vocabulary of some size."""
    config = copy.deepcopy(model.config)
    text_config(config).vocab_size = size
    try:
        with torch.device("meta"):
            return {path: tensor.shape for path, tensor in _tensors(type(model)(config))}
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be built from its config alone, so a trimmed one could not be loaded: "
            f"{error}. Nothing was changed."
        ) from error


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _validate_all_found(model: PreTrainedModel, dims: dict[str, int]) -> None:
    """Checks that no other module shares a tensor that would be replaced."""
    replaced = {id(tensor): path for path, tensor in _tensors(model) if path in dims}
    for path, tensor in _tensors(model):
        if path not in dims and id(tensor) in replaced:
            raise ValueError(
                f"'{path}' of this {type(model).__name__} shares its values with '{replaced[id(tensor)]}', but the "
                "model's class does not make it so. Untie them first. Nothing was changed."
            )


def parameters_per_id(model: PreTrainedModel, dims: dict[str, int]) -> int:
    """Number of parameters that go with an id; shared ones count once."""
    parameters = {p: path for path, p in model.named_parameters(remove_duplicate=False) if path in dims}
    return sum(p.numel() // p.shape[dims[path]] for p, path in parameters.items())


def ids_of_model(model: PreTrainedModel) -> set[int]:
    """The ids that a model's configs and modules name, and those that must keep their number.

    Models like RoBERTa number positions from the padding's id on. Where a module beside the embeddings of tokens knows
    that id, it must not change: all ids before it stay.
    """
    size = text_config(model.config).vocab_size
    named = {token for token in ids_in_fields(_holders(model)) if 0 <= token < size}
    paddings = [
        padding
        for module in model.modules()
        if (padding := vars(module).get("padding_idx")) is not None
        and not isinstance(module, PreTrainedModel)
        and vars(module).get("num_embeddings") != size
    ]
    return named | set(range(min(max(paddings, default=-1) + 1, size)))


# Parameters that are made in inference mode could never be trained.
@torch.inference_mode(False)
def keep_ids(model: PreTrainedModel, dims: dict[str, int], kept: Sequence[int], renumber: Renumber) -> None:
    """Cuts a model down to some ids, in place. Modules stay the same objects, their parameters are replaced.

    Args:
        model (`PreTrainedModel`): The model.
        dims (`dict[str, int]`): What [`vocabulary_tensors`] found.
        kept (`Sequence[int]`): The ids that stay, in their new order.
        renumber (`Callable[[int], int]`): The new id of an id; ids beyond the vocabulary stay.
    """
    size, tensors = text_config(model.config).vocab_size, dict(_tensors(model))
    smaller = {tensors[path]: _rows(tensors[path], dim, kept) for path, dim in dims.items()}
    for path in dims:
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, name, smaller[tensors[path]])
        _resize(module, size, len(kept))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _resize(module, size, len(kept))
    for holder in _holders(model):
        renumber_fields(holder, renumber)
        if isinstance(holder, PretrainedConfig):
            _resize(holder, size, len(kept))


def _rows(tensor: torch.Tensor, dim: int, kept: Sequence[int]) -> torch.Tensor:
    fewer = tensor.data.index_select(dim, torch.tensor(kept, device=tensor.device))
    return nn.Parameter(fewer, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fewer


def _resize(holder: Any, size: int, new: int) -> None:
    """Writes the new size of the vocabulary where the old one stands."""
    vars(holder).update({name: new for name in SIZES if vars(holder).get(name) == size})


def _holders(model: PreTrainedModel) -> list[Any]:
    """All objects of a model with fields that can hold ids: modules, their configs, the config of generation."""
    modules = list(model.modules())
    configs = [
        vars(module)["config"] for module in modules if isinstance(vars(module).get("config"), PretrainedConfig)
    ]
    configs.append(text_config(model.config))
    generation = [vars(model)["generation_config"]] if vars(model).get("generation_config") else []
    return list({id(holder): holder for holder in (*modules, *configs, *generation)}.values())
