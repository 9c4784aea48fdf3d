"""Groups of every architecture, held against the paths that the zoo writes out."""

import pytest
from tiny import make_model
from zoo import ALL_HEADS, ALL_NEURONS, HEADS, LAYERS, ZOO

from hap_transformers import prune_heads
from hap_transformers.components.groups import KINDS, by_kind, find_groups, in_forward_order, layers, register_kind


def names_of(groups):
    return [(group.layer, group.kind.name) for group in groups]


def test_projections_are_those_of_the_zoo(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    assert layers(model)[:LAYERS] == [model.get_submodule(tiny.layer.format(layer)) for layer in range(LAYERS)]
    groups = [group for group in find_groups(model) if not group.decoded]
    assert names_of(groups) == [(layer, kind) for kind in ("heads", "neurons") for layer in range(LAYERS)]
    for group in groups:
        heads = group.kind.name == "heads"
        paths, out = (tiny.heads_in, tiny.heads_out) if heads else (tiny.neurons_in, tiny.neurons_out)
        layer = model.get_submodule(tiny.layer.format(group.layer))
        assert [writer.module for writer in group.writers] == [layer.get_submodule(path) for path in paths]
        assert [writer.part for writer in group.writers] == [paths[:i].count(path) for i, path in enumerate(paths)]
        assert [writer.parts for writer in group.writers] == [paths.count(path) for path in paths]
        assert group.reader.module is layer.get_submodule(out)
        # Only DeBERTa-v2 has projections of relative positions.
        assert len(group.followers) == (2 if heads and model_type == "deberta-v2" else 0)
        assert list(group.kept) == (ALL_HEADS if heads else ALL_NEURONS) and group.original == len(group.kept)


def test_a_component_owns_what_goes_with_it(model_type):
    """A whole group owns all parameters of its projections except the reader's bias."""
    model = ZOO[model_type].model()
    for group in find_groups(model):
        writers = {writer.module: writer for writer in (*group.writers, *group.followers)}
        sizes = [p.numel() for writer in writers.values() for p in writer.parameters]
        assert (
            group.parameters_per_component() * group.num_components == sum(sizes) + group.reader.module.weight.numel()
        )


def test_the_order_of_a_forward_pass():
    groups = find_groups(make_model())
    assert names_of(in_forward_order(reversed(groups))) == [(0, "heads"), (0, "neurons"), (1, "heads"), (1, "neurons")]
    assert [(kind.name, names_of(members)) for kind, members in by_kind(groups).items()] == [
        ("heads", [(0, "heads"), (1, "heads")]),
        ("neurons", [(0, "neurons"), (1, "neurons")]),
    ]
    assert names_of(find_groups(make_model(), ["neurons"])) == [(0, "neurons"), (1, "neurons")]


def test_heads_keep_their_numbers_and_neurons_do_not():
    model = make_model()
    prune_heads(model, {0: [0, 2]})
    first, second = find_groups(model, ["heads"])
    assert list(first.kept) == [1, 3] and first.original == HEADS and list(second.kept) == ALL_HEADS


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'heads' already"):
        register_kind(KINDS["heads"])


def test_a_layer_that_is_the_same_module_as_another_is_named():
    model = make_model()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    with pytest.raises(ValueError, match="layer 'encoder.layer.1' of this Bert.* the same module as a layer before"):
        find_groups(model)
