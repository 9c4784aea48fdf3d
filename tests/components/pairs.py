"""A kind of component as a user would add it: two neighbouring FFN neurons are one unit."""

from hap_transformers.components.groups import Group, Kind, layer_paths
from hap_transformers.components.projections import find_projections
from hap_transformers.components.subclasses import empty_inputs, empty_outputs


def find(model, architecture):
    """Lists a model's feed-forward blocks as groups of pairs, first layer first."""
    names, groups = architecture.names["pairs"], []
    for layer, path in enumerate(layer_paths(model, architecture)):
        writers = find_projections(model.base_model, path, names.inputs)
        (reader,) = find_projections(model.base_model, path, (names.output,))
        count = reader.in_features // 2
        groups.append(Group(PAIRS, layer, writers, [], [reader], range(count), count))
    return groups


def fit(group):
    """Makes the projections of a block without pairs compute no matrix product."""
    if not group.num_components:
        for writer in group.writers:
            empty_outputs(writer.module)
        empty_inputs(group.reader.module)


PAIRS = Kind("pairs", "pair", "pairs of FFN neurons", find, fit, floor=0.05, floor_is_share=True, step=4)
