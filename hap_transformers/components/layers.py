"""Whole layers as components: all heads and neurons of a layer at once.

A layer without heads and neurons is emptied: it adds its output biases, and computes no matrix product. So what is
removed, recorded and rebuilt are its heads and neurons.
"""

from transformers import PreTrainedModel

from .architectures import Architecture
from .groups import Group, Kind, find_groups, kinds_in_use, layer_paths, register_kind
from .heads import HEADS
from .neurons import NEURONS


NAME = "layers"


def find(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """Lists a model's layers, each a group of one component, or of none where the layer has been emptied."""
    parts = [group for group in find_groups(model, kinds_in_use(model)) if not group.kind.outside]
    return [
        _group(layer, [group for group in parts if group.block == layer])
        for layer in range(len(layer_paths(model, architecture)))
    ]


def _group(layer: int, members: list[Group]) -> Group:
    writers, followers, readers = (
        [projection for group in members for projection in getattr(group, name)]
        for name in ("writers", "followers", "readers")
    )
    left = any(group.num_components for group in members)
    whole = Group(LAYERS, layer, writers, followers, readers, range(left), 1, around=members[0].around)
    whole.members, whole.decoded = members, members[0].decoded
    return whole


def fit(group: Group) -> None:
    """Does nothing: what a layer is made of is fitted."""


LAYERS = Kind(
    name=NAME,
    singular="layer",
    label="whole layers",
    find=find,
    fit=fit,
    floor=0,
    floor_is_share=False,
    made_of=(HEADS.name, NEURONS.name),
)
register_kind(LAYERS)
