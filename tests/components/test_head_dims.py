"""Attention whose heads have lost dimensions behaves as masked attention does, with its maps and caches."""

import copy
import dataclasses
import pickle

import pytest
import torch
from dims import ALL, CASES, head_size, left_of, masked_dims, numbers, query_keys_of_head, without
from tiny import make_batch, make_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel
from zoo import HEADS, LAYERS, ZOO, logits, masked

from hap_transformers import ARCHITECTURES, PruningPlan, apply_plan
from hap_transformers.components.groups import find_groups
from hap_transformers.efficiency import count_flops, count_parameters


DIMS = ("query_key_dims", "value_dims")


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_pruned_is_masked(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    for case, gone in CASES.items():
        expected = logits(masked_dims(model, tiny, gone), tiny)
        assert not torch.allclose(expected, logits(model, tiny), rtol=0, atol=1e-7), case
        smaller = without(model, tiny, gone)
        torch.testing.assert_close(logits(smaller, tiny), expected, rtol=0, atol=1e-10, msg=case)
        plan = PruningPlan.for_model(model, **numbers(model, tiny, gone))
        assert count_parameters(model) - count_parameters(smaller) == plan.count_parameters(model) > 0


def of_encoder(model, kinds=None):
    """Groups of the layers that the zoo names."""
    return [group for group in find_groups(model, kinds) if not group.decoded]


def test_groups_of_what_is_left(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    size = head_size(model, tiny)
    query_keys = query_keys_of_head(model, size)
    before = of_encoder(model, DIMS)
    assert [group.original for group in before] == [HEADS * query_keys] * LAYERS + [HEADS * size] * LAYERS
    assert [group.kind.name for group in of_encoder(model)] == ["heads"] * LAYERS + ["neurons"] * LAYERS
    smaller = without(model, tiny, {0: {1: (ALL, ALL), 2: ([0], [1, 2])}})
    query_key, _, values, _, *neurons = of_encoder(smaller)
    assert left_of(values) == [size, 0, size - 2, size]
    assert left_of(query_key) == [query_keys, 0, query_keys - (query_keys > 1), query_keys]
    assert {group.kind.name for group in neurons} == {"neurons"}
    for group in (query_key, values):
        assert group.num_components == sum(group.runs.left) == group.original
        owned = group.parameters_per_component() * group.num_components
        sizes = [p.weights_by_rows() for p in (*group.writers, *group.followers)]
        assert owned == sum(sizes) + sum(reader.module.weight.numel() for reader in group.readers)


def test_pairs_are_of_entries_that_say_so(monkeypatch):
    """Query/key dimensions of a head go together where anything else acts on them, too."""
    model, entry = ZOO["llama"].model(), ARCHITECTURES["llama"]
    for change, count in (({}, 8), ({"rotary": False}, 4), ({"query_norm": "self_attn.q_proj"}, 4)):
        heads = dataclasses.replace(entry.names["heads"], **change)
        changed = dataclasses.replace(entry, names={**entry.names, "heads": heads})
        monkeypatch.setitem(ARCHITECTURES, "llama", changed)
        assert find_groups(model, ["query_key_dims"])[0].num_components == count


def test_dimensions_after_heads_and_twice(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    first, second = {0: {0: ([0], [1])}, 1: {2: ([1, 2], [0])}}, {0: {0: ([1], [2])}, 1: {1: (ALL, ALL)}}
    both = {0: {0: ([0, 1], [1, 2]), 3: (ALL, ALL)}, 1: {2: ([1, 2], [0]), 1: (ALL, ALL)}}
    expected = masked_dims(model, tiny, both)
    model.prune_heads({0: [3]})
    # Dimensions of heads are numbered as they are: the head that is gone was the last, and has none.
    size = head_size(tiny.model(), tiny)
    plan = numbers(tiny.model(), tiny, first)
    apply_plan(model, PruningPlan.for_model(model, **plan))
    assert model.config.pruned_heads == {}
    taken = {kind: {layer: sorted(gone) for layer, gone in layers.items()} for kind, layers in plan.items()}
    again = numbers(tiny.model(), tiny, second)
    for kind, layers in again.items():
        for layer, own in layers.items():
            gone = taken[kind].get(layer, [])
            layers[layer] = [number - sum(before < number for before in gone) for number in own]
    apply_plan(model, PruningPlan.for_model(model, **again))
    assert_equal(logits(model, tiny), logits(expected, tiny))
    assert left_of(find_groups(model, ["value_dims"])[0]) == [size - 2, size, size, 0]


def test_neurons_and_dimensions_together(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    expected = masked_dims(masked(model, tiny, {}, {0: [1], 1: range(24)}), tiny, CASES["some"])
    plan = PruningPlan.for_model(model, **numbers(model, tiny, CASES["some"]), neurons={0: [1], 1: range(24)})
    apply_plan(model, plan)
    assert_equal(logits(model, tiny), logits(expected, tiny))


def test_pickled_and_copied(model_type):
    tiny = ZOO[model_type]
    model = without(tiny.model(), tiny, CASES["a head"])
    expected = logits(model, tiny)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        torch.testing.assert_close(logits(other, tiny), expected, rtol=0, atol=1e-12)
        apply_plan(other, PruningPlan.for_model(other, value_dims={1: [0]}))
    torch.testing.assert_close(logits(model, tiny), expected, rtol=0, atol=0)


def test_attention_maps(model_type):
    """Heads that are gone have none. Those without query/key dimensions weigh all tokens alike."""
    tiny = ZOO[model_type]
    model = tiny.model(attn_implementation="eager")
    gone = {0: {1: (ALL, ALL), 2: (ALL, [])}, 1: {0: ([1], [2])}}
    expected = masked_dims(model, tiny, gone)
    smaller = without(model, tiny, gone)

    def maps(model):
        outputs = model(**tiny.batch(), output_attentions=True)
        return outputs.get("attentions") or outputs.get("encoder_attentions")

    found, wanted = maps(smaller), maps(expected)
    alive = [head * tiny.shared + i for head in (0, 2, 3) for i in range(tiny.shared)]
    for layer, (own, other) in enumerate(zip(found, wanted, strict=True)):
        first = layer % 2 == 0 if model_type != "albert" else layer < 2
        first &= model_type != "swin"  # Which has maps of the last layer only.
        torch.testing.assert_close(own, other[:, alive] if first else other, rtol=0, atol=1e-6)
    if model_type in ("bert", "vit", "gpt2"):
        uniform = found[0][0, 1]
        allowed = uniform > 0
        torch.testing.assert_close(uniform, allowed / allowed.sum(-1, keepdim=True).to(uniform))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "qwen3"])
@pytest.mark.parametrize("case", ["a head", "all heads"])
def test_generation_with_a_cache(model_type, case):
    tiny = dataclasses.replace(ZOO[model_type], task="LMHeadModel" if model_type == "gpt2" else "ForCausalLM")
    model = tiny.model(tie_word_embeddings=True)
    expected = masked_dims(model, tiny, CASES[case])
    smaller = without(model, tiny, CASES[case])
    settings = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    prompt = tiny.batch()["input_ids"]
    tokens = smaller.generate(prompt, **settings)
    assert torch.equal(tokens, expected.generate(prompt, **settings, use_cache=False))


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
@pytest.mark.parametrize("case", ["a head", "all heads"])
@pytest.mark.parametrize("cross_attention", [False, True])
def test_decoders_with_an_encoder_decoder_cache(model_type, case, cross_attention):
    """Decoders with cross-attention lose dimensions of their self-attention."""
    tiny = dataclasses.replace(ZOO[model_type], task="LMHeadModel")
    model = tiny.model(torch.float32, is_decoder=True, add_cross_attention=cross_attention)
    expected = masked_dims(model, tiny, CASES[case])
    smaller = without(model, tiny, CASES[case])
    batch = {**tiny.batch(), **({"encoder_hidden_states": torch.ones(3, 5, 16)} if cross_attention else {})}
    torch.testing.assert_close(smaller(**batch, use_cache=True).logits, expected(**batch, use_cache=False).logits)


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "gpt2", "llama", "modernbert", "t5"])
def test_gradients_are_those_of_the_masked_model(model_type):
    """Of all parameters that have lost nothing."""
    tiny = ZOO[model_type]
    model = tiny.model()
    smaller, expected = without(model, tiny, CASES["some"]), masked_dims(model, tiny, CASES["some"])
    for each in (smaller, expected):
        logits(each, tiny).square().sum().backward()
    reference, compared = dict(expected.named_parameters()), 0
    for name, parameter in smaller.named_parameters():
        if parameter.shape == reference[name].shape and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-7, atol=1e-9)
            compared += 1
    assert compared > 10


def test_heads_that_are_gone_run_no_attention():
    """Attention of two heads costs half that of four; the other two still work with all their dimensions."""
    tiny = ZOO["bert"]
    model, batch = tiny.model(torch.float32), tiny.batch()
    heads = copy.deepcopy(model)
    heads.prune_heads({0: [1, 2]})
    dims = without(model, tiny, {0: {1: (ALL, ALL), 2: (ALL, ALL)}})
    assert count_flops(dims, batch) == count_flops(heads, batch) < count_flops(model, batch)
    assert count_flops(without(model, tiny, {0: {1: ([0], [])}}), batch) == count_flops(model, batch) - 2 * 2 * 16 * 21


def test_modules_stay_the_same_with_their_hooks():
    model, heard = make_model(), []
    layer = model.bert.encoder.layer[0].attention
    modules = list(model.modules())
    layer.self.query.register_forward_hook(lambda m, args, output: heard.append(output.shape[-1]))
    layer.output.dense.register_forward_hook(lambda m, args, output: heard.append(args[0].shape[-1]))
    frozen = layer.self.query.weight.requires_grad_(False)
    apply_plan(model, PruningPlan.for_model(model, **numbers(model, ZOO["bert"], CASES["some"])))
    assert list(model.modules()) == modules
    model(**make_batch())
    assert heard == [16, 16]  # What others see of a projection has the size that it had.
    assert not layer.self.query.weight.requires_grad and layer.self.key.weight.requires_grad
    assert frozen is not layer.self.query.weight and isinstance(layer.self.query, torch.nn.Linear)


WIDE = {
    "bert": (BertModel, BertConfig, {}, "encoder.layer.0.attention", ("self.value", "output.dense"), 12),
    "llama": (
        LlamaModel,
        LlamaConfig,
        {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
        "layers.0.self_attn",
        ("v_proj", "o_proj"),
        3,
    ),
}


@pytest.mark.parametrize("family", WIDE)
def test_real_widths_on_two_threads(family):
    model_class, config_class, sizes, attention, paths, heads = WIDE[family]
    torch.manual_seed(0)
    config = config_class(**sizes, num_hidden_layers=1, intermediate_size=64, vocab_size=50)
    model = model_class(config).eval()
    expected = copy.deepcopy(model)
    left = [0, *(8 * (1 + head % 8) for head in range(1, heads))]  # Of 64 each.
    gone = [head * 64 + dim for head in range(heads) for dim in range(left[head], 64)]
    query_keys = list(range(64))
    if family == "llama":  # Of 32 rotary pairs, odd ones of the last heads, too.
        query_keys = [*range(32), *range(33, 96, 2)]
        zeroed = [(pair // 32, pair % 32 + half) for pair in query_keys for half in (0, 32)]
        for name in ("q_proj", "k_proj"):
            weight = expected.get_submodule(f"{attention}.{name}").weight.data
            for head, dim in zeroed:
                weight.unflatten(0, (3, -1, 64))[head, :, dim] = 0
    value, out = (expected.get_submodule(f"{attention}.{path}") for path in paths)
    with torch.no_grad():
        for tensor in (value.weight, value.bias):
            if tensor is not None:
                tensor[gone] = 0
        columns = out.weight.unflatten(1, (heads, -1, 64))
        for head in range(heads):
            columns[:, head, :, left[head] :] = 0
    apply_plan(model, PruningPlan.for_model(model, value_dims={0: gone}, query_key_dims={0: query_keys}))
    inputs = {"input_ids": torch.arange(48).view(2, 24)}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found, wanted = model(**inputs).last_hidden_state, expected(**inputs).last_hidden_state
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
