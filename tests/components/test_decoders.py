"""Decoders of encoder-decoders without heads of self-attention and cross-attention, and without neurons."""

import pytest
import torch
from seq2seq import CROSS, ENCODER, SELF, SEQ2SEQ, all_of
from transformers import GenerationMixin

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.components.groups import find_groups, in_forward_order
from hap_transformers.components.releases import TRANSFORMERS_4


# By layer, as they are numbered: the encoder's, the decoder's, its cross-attention.
CASES = {
    "some": {
        "heads": {0: [1], SELF[0]: [0], SELF[1]: [1], CROSS[1]: [0]},
        "neurons": {1: [3, 4], SELF[1]: [0, 7], SELF[0]: [2]},
    },
    "first cross-attention": {"heads": {CROSS[0]: [1]}},
    "all": {
        "heads": {layer: all_of(4) for layer in (SELF[0], CROSS[0])},
        "neurons": {SELF[1]: all_of(24)},
    },
    "no self-attention": {"heads": {layer: all_of(4) for layer in SELF}},
    "no cross-attention": {"heads": {layer: all_of(4) for layer in CROSS}},
    "dims": {
        "query_key_dims": {0: [1], SELF[0]: [0, 1], CROSS[0]: [2, 5], CROSS[1]: [7]},
        "value_dims": {1: [1], SELF[1]: [2, 9], CROSS[0]: [0, 3], CROSS[1]: [4, 10]},
    },
}


def removed(tiny, case):
    """What a case removes from a model, whose decoder may have fewer heads."""
    gone = {kind: dict(layers) for kind, layers in CASES[case].items()}
    for layer, heads in gone.get("heads", {}).items():
        gone["heads"][layer] = [head for head in heads if head < tiny.heads(layer)]
    for layer, neurons in gone.get("neurons", {}).items():
        if len(neurons) == 24 and tiny.family != "T5":
            gone["neurons"][layer] = all_of(32)
    return gone


def masked(tiny, model, gone):
    """The dense model, masked: of query/key dimensions the rows of queries, of value dimensions the contexts."""
    found = tiny.masked(model, **{kind: gone[kind] for kind in gone.keys() & {"heads", "neurons"}})
    for group in find_groups(found, gone.keys() & {"query_key_dims", "value_dims"}):
        for number in gone[group.kind.name].get(group.layer, ()):
            rows = group.writers[0]
            rows.module.weight.data[number] = 0
            if rows.has_bias:
                rows.module.bias.data[number] = 0
    return found


@pytest.fixture(params=sorted(SEQ2SEQ))
def tiny(request):
    return SEQ2SEQ[request.param]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pruned_is_masked(tiny, case, attention):
    if TRANSFORMERS_4 and tiny.family == "T5":
        attention = "eager"  # It has no other.
    model, batch = tiny.model(attn_implementation=attention), tiny.batch()
    gone = removed(tiny, case)
    expected = masked(tiny, model, gone)
    apply_plan(model, PruningPlan.for_model(model, **gone))
    with torch.no_grad():
        found, wanted, dense = (each(**batch).logits for each in (model, expected, tiny.model()))
    assert (found - wanted).abs().max() < 1e-10 < 1e-4 < (found - dense).abs().max()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("case", ["some", "all", "no cross-attention", "dims"])
def test_generates_what_the_masked_model_does(tiny, case, settings):
    model, batch = tiny.model(), tiny.batch()
    del batch["labels"]
    gone = removed(tiny, case)
    expected = masked(tiny, model, gone)
    apply_plan(model, PruningPlan.for_model(model, **gone))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **settings}
    without_cache = {name: value for name, value in settings.items() if name != "cache_implementation"}
    # Whisper's own method cuts and joins segments.
    found = GenerationMixin.generate(model, **batch, **settings)
    assert torch.equal(found, GenerationMixin.generate(expected, **batch, **without_cache, use_cache=False))


def test_groups_in_forward_order(tiny):
    groups = in_forward_order(find_groups(tiny.model(), ["heads", "neurons"]))
    of_decoder = [(group.kind.name, group.layer, group.reader.name) for group in groups if group.decoded]
    wanted = [
        (kind, layer, tiny.reader(kind, layer).removeprefix("model."))
        for self_, cross in zip(SELF, CROSS, strict=True)
        for kind, layer in (("heads", self_), ("heads", cross), ("neurons", self_))
    ]
    assert of_decoder == wanted
    of_encoder = [group.layer for group in groups if not group.decoded]
    assert of_encoder == [layer for layer in range(ENCODER) for _ in range(2)]
