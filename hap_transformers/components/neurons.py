"""FFN neurons as components: a row of each input projection, and a column of the output projection."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import Architecture, decoder_paths, named_layers
from .groups import Group, Kind, register_kind
from .projections import find_projections
from .response_norm import ResponseNorm
from .subclasses import cached, dense_class, subclass, take_class


NAME = "neurons"


def find(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """Lists a model's feed-forward blocks, first layer first.

    Raises:
        ValueError: If the architecture's entry does not fit the model.
    """
    groups, of_decoder = [], decoder_paths(model, architecture)
    for layer, (path, names) in enumerate(named_layers(model, architecture, NAME)):
        around = model.base_model.get_submodule(path[:-1])
        inside, parameters = dict(around.named_modules()), dict(around.named_parameters())
        if names.output not in inside and names.otherwise is not None:
            names = names.otherwise
        writers = find_projections(model.base_model, path, names.inputs, optional=True)
        (reader,) = find_projections(model.base_model, path, (names.output,))
        sizes = {projection.out_features for projection in writers}
        if sizes != {reader.in_features}:
            raise ValueError(
                f"'{reader.name}' of {type(model).__name__} reads {reader.in_features} neurons, but "
                f"{[projection.name for projection in writers]} give {sorted(sizes)}; the entry of "
                f"'{model.config.model_type}' in hap_transformers.ARCHITECTURES does not fit this model."
            )
        count = reader.in_features
        activation = model.base_model.get_submodule(path + names.activation) if names.activation else None
        followers = [ResponseNorm(path + name, inside[name]) for name in names.followers if name in inside]
        group = Group(NEURONS, layer, writers, list(followers), [reader], range(count), count, activation, names)
        group.alone, group.scale = names.apart, parameters.get(names.scale or "")
        group.read_by = around.get_submodule(names.norm) if names.norm else None
        group.implantable, group.decoded = activation, path in of_decoder
        group.plain = names.config_neurons
        groups.append(group)
    return groups


def fit(group: Group) -> None:
    """Makes the projections of a feed-forward block without neurons compute no matrix product."""
    if not group.num_components:
        for projection in group.writers:
            projection.empty(outputs=True)
        group.reader.empty(outputs=False)


def write_plain(config: PretrainedConfig, group: Group, count: int) -> None:
    """Writes the neurons of all layers into a config."""
    setattr(config, group.plain, count)


def set_implant_rank(group: Group, rank: int) -> None:
    """Makes the last `rank` neurons of a group linear: their activations are what they read.

    In a gated block the gate that goes through the activation becomes 1 for them.
    """
    activation = group.implantable
    assert activation is not None  # Callers have refused architectures whose activation is not known.
    vars(activation)["implant_rank"] = rank
    dense = dense_class(activation)
    take_class(activation, _with_implant(dense, len(group.writers) > 1) if rank else dense)


@cached
def _with_implant(activation_class: type[nn.Module], gated: bool) -> type[nn.Module]:
    """Subclasses an activation so that its last `implant_rank` features are left as they are, or, gated, become 1."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        neurons = hidden_states.shape[-1] - self.implant_rank
        linear = hidden_states[..., neurons:]
        if gated:
            linear = torch.ones_like(linear)
        return torch.cat([activation_class.forward(self, hidden_states[..., :neurons]), linear], -1)

    return subclass("Implanted", activation_class, forward, _with_implant, activation_class, gated)


NEURONS = Kind(
    name=NAME,
    singular="neuron",
    label="FFN neurons",
    find=find,
    fit=fit,
    floor=0.05,
    floor_is_share=True,
    step=8,  # Matrix products are fastest when widths are multiples of this.
    implant=set_implant_rank,
    write_plain=write_plain,
)
register_kind(NEURONS)
