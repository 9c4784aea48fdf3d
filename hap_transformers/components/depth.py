"""Models without the layers that a uniform plan has emptied: a checkpoint has fewer layers, and so has its config."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import decoder_paths, get_architecture
from .groups import Group, find_groups
from .record import UNIFORM, recorded_structure


# Entries of a config with a value for each layer.
PER_LAYER = ("layer_types",)
# Attributes of a module that say which layer it is in.
PLACES = ("layer_idx", "layer_id")


def emptied_layers(groups: Sequence[Group], left: Sequence[int]) -> set[int]:
    """The layers of which nothing is left, given how many components every group has."""
    inside = [(group.block, count) for group, count in zip(groups, left, strict=True) if not group.kind.outside]
    return {layer for layer, _ in inside} - {layer for layer, count in inside if count}


def layers_to_leave_out(model: PreTrainedModel) -> set[int]:
    """The layers that a checkpoint of a model lacks: those that a uniform plan has emptied."""
    if not (recorded_structure(model.config) or {}).get(UNIFORM):
        return set()
    groups = find_groups(model)
    return emptied_layers(groups, [group.num_components for group in groups])


def why_layers_stay(model: PreTrainedModel, groups: Sequence[Group]) -> str | None:
    """Why a model's emptied layers cannot be left out of its checkpoints, if so: they must change nothing."""
    architecture = get_architecture(model)
    if not architecture.norm_first:
        return "its layers normalize the residual stream, also where nothing is left of them"
    if any(reader.has_bias for group in groups if not group.kind.outside for reader in group.readers):
        return "its layers add biases, also where nothing else is left of them"
    if decoder_paths(model, architecture):
        return "its encoder and its decoder have layers of their own"
    if architecture.tower or ".*." in architecture.layers or {"heads", "neurons"} - architecture.names.keys():
        return "its config does not say the number of its layers, or they have parts that stay"
    return None


@contextmanager
def layers_left_out(model: PreTrainedModel, gone: Collection[int]) -> Iterator[None]:
    """Takes layers out of a model's list for a time; those behind them move up."""
    if not gone:
        yield
        return
    parent, name = _place_of_layers(model)
    whole = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(layer for i, layer in enumerate(whole) if i not in gone))
    try:
        yield
    finally:
        setattr(parent, name, whole)


def _place_of_layers(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module that has the list of layers, and the list's name there."""
    path, _, name = get_architecture(model).layers.rpartition(".")
    return model.base_model.get_submodule(path), name


def renamed(model: PreTrainedModel, values: dict[str, Any], gone: Collection[int]) -> dict[str, Any]:
    """Values by the names of a model's parameters under the names that these have without some layers."""
    layers: Any = model.base_model.get_submodule(get_architecture(model).layers)
    prefix = next(path for path, module in model.named_modules() if module is layers) + "."
    left = [i for i in range(len(layers)) if i not in gone]
    moved = {f"{prefix}{i}.": f"{prefix}{place}." for place, i in enumerate(left)}
    found = {}
    for name, value in values.items():
        own = prefix + name.removeprefix(prefix).partition(".")[0] + "."
        if not name.startswith(prefix):
            found[name] = value
        elif own in moved:
            found[moved[own] + name.removeprefix(own)] = value
    return found


def write_depth(config: PretrainedConfig, gone: Collection[int]) -> None:
    """Writes into a config that it has some layers less."""
    total = config.num_hidden_layers
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, list | tuple) and len(values) == total:
            setattr(config, name, [value for layer, value in enumerate(values) if layer not in gone])
    config.num_hidden_layers = total - len(gone)


def plain_facts(model: PreTrainedModel) -> dict[tuple[str, str], Any]:
    """Plain attributes of all modules in layers but for the layer's number, and the shapes of all parameters.

    Modules outside may name types of layers that are no longer there.
    """
    layers: nn.Module = getattr(*_place_of_layers(model))
    facts: dict[tuple[str, str], Any] = {
        (path, name): value
        for path, module in layers.named_modules()
        for name, value in vars(module).items()
        if name not in PLACES and name[0] != "_" and isinstance(value, bool | int | float | str | tuple | type(None))
    }
    return facts | {(name, "shape"): parameter.shape for name, parameter in model.named_parameters()}
