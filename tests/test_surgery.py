"""Removing heads and neurons must equal masking them in the dense model."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from conftest import make_batch, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, BloomConfig, BloomModel
from transformers.pytorch_utils import Conv1D
from zoo import HEADS, LAYERS, NEURONS, ZOO

from hap_transformers import ARCHITECTURES, Architecture, PruningPlan, apply_plan, prune_heads


ALL_HEADS, ALL_NEURONS = list(range(HEADS)), list(range(NEURONS))


def masked(model, tiny, heads, neurons):
    """A copy of the dense model whose output projections are blind to what is removed."""
    copied = copy.deepcopy(model)
    for layer, which in itertools.product(range(LAYERS), (0, 1)):
        module = tiny.modules(copied, layer)[which]
        weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.T
        components = weight.unflatten(0, ((HEADS, NEURONS)[which], -1))
        for component in (heads, neurons)[which].get(layer, ()):
            components[component] = 0
    return copied


def logits(model, tiny):
    return model(**tiny.batch(dtype=model.dtype)).logits


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


removals = st.tuples(
    st.dictionaries(st.integers(0, LAYERS - 1), st.sets(st.sampled_from(ALL_HEADS)).map(sorted)),
    st.dictionaries(
        st.integers(0, LAYERS - 1), st.one_of(st.just(ALL_NEURONS), st.sets(st.sampled_from(ALL_NEURONS)).map(sorted))
    ),
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(first=removals, second=removals)
def check_plans(model_type, attention, first, second):
    """Two random plans one after the other, the second on what the first has left."""
    tiny = ZOO[model_type]
    model = tiny.model(attn_implementation=attention)
    dense = copy.deepcopy(model)
    gone_heads, left_neurons = {}, {layer: ALL_NEURONS for layer in range(LAYERS)}
    for heads, neurons in (first, second):
        neurons = {layer: [n for n in gone if n < len(left_neurons[layer])] for layer, gone in neurons.items()}
        plan = PruningPlan.for_model(model, heads=heads, neurons=neurons)
        before, promised = count(model), plan.count_parameters(model)
        apply_plan(model, plan)
        assert before - count(model) == promised
        for layer, numbers in heads.items():
            gone_heads[layer] = {*gone_heads.get(layer, ()), *numbers}
        for layer, numbers in neurons.items():
            left_neurons[layer] = [n for i, n in enumerate(left_neurons[layer]) if i not in numbers]
        gone_neurons = {layer: set(ALL_NEURONS) - set(left) for layer, left in left_neurons.items()}
        expected = logits(masked(dense, tiny, gone_heads, gone_neurons), tiny)
        torch.testing.assert_close(logits(model, tiny), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_removing_equals_masking(model_type, attention):
    tiny = ZOO[model_type]
    if attention == "sdpa" and not type(tiny.model())._supports_sdpa:
        pytest.skip(f"{model_type} has no sdpa attention in this release of Transformers")
    check_plans(model_type, attention)


def test_every_head_and_neuron_matters(model_type):
    """Else the comparison with masks would show nothing."""
    tiny = ZOO[model_type]
    model = tiny.model()
    dense = logits(model, tiny)
    for layer in range(LAYERS):
        for heads, neurons in [({layer: [h]}, {}) for h in ALL_HEADS] + [({}, {layer: [n]}) for n in ALL_NEURONS]:
            assert (logits(masked(model, tiny, heads, neurons), tiny) - dense).abs().max() > 1e-8


def test_old_contract(model_type):
    """Numbers are the original ones, prunings accumulate, repeated heads are passed over."""
    tiny = ZOO[model_type]
    model, other = tiny.model(), tiny.model()
    model.prune_heads({0: [1]})
    model.prune_heads({0: [1, 2], 1: [3]})
    other.prune_heads({0: [2, 1], 1: [3]})
    assert model.config.pruned_heads == {0: [1, 2], 1: [3]}
    assert torch.equal(logits(model, tiny), logits(other, tiny))
    expected = logits(masked(tiny.model(), tiny, {0: [1, 2], 1: [3]}, {}), tiny)
    torch.testing.assert_close(logits(model, tiny), expected, rtol=0, atol=1e-10)


class CountProducts(TorchDispatchMode):
    """Counts matrix products and attention kernels."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += any(name in str(function) for name in (".mm.", "bmm.", "addmm.", "scaled_dot_product"))
        return function(*args, **(kwargs or {}))


def test_emptied_layers_multiply_no_matrices(model_type):
    """What is left is the residual path plus the output bias."""
    tiny = ZOO[model_type]
    model = tiny.model(torch.float32)
    apply_plan(model, PruningPlan.for_model(model, heads={0: ALL_HEADS}, neurons={0: ALL_NEURONS}))
    products = []
    with CountProducts() as counter, torch.no_grad():
        for layer in range(LAYERS):
            module = model.get_submodule(tiny.layer.format(layer))
            module.register_forward_pre_hook(lambda *_: products.append(-counter.products))
            module.register_forward_hook(lambda *_: products.append(products.pop() + counter.products))
        logits(model, tiny)
    if model_type == "albert":  # Two calls share a layer's weights.
        products = products[::2]
    assert products[0] == 0 and products[1] > 0


def test_attention_maps_of_pruned_layers(model_type):
    tiny = ZOO[model_type]
    model = tiny.model(attn_implementation="eager")
    model.prune_heads({0: ALL_HEADS, 1: [0]})
    outputs = model(**tiny.batch(), output_attentions=True)
    maps = outputs.get("attentions") or outputs.get("encoder_attentions")
    if model_type == "albert":  # Two calls share a layer's weights.
        maps = maps[::2]
    group = model.config.num_attention_heads // HEADS
    assert [attention.shape[1] for attention in maps if attention is not None] == [0, (HEADS - 1) * group]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("heads", [{0: ALL_HEADS}, {1: ALL_HEADS}, {0: [1, 2], 1: [0]}], ids=str)
def test_generation_with_a_cache(model_type, heads):
    """The cache counts the tokens seen, also where its layer has no head."""
    tiny = dataclasses.replace(ZOO[model_type], task="LMHeadModel" if model_type == "gpt2" else "ForCausalLM")
    model = tiny.model(tie_word_embeddings=True)
    expected = masked(model, tiny, heads, {})
    model.prune_heads(heads)
    settings = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    prompt = tiny.batch()["input_ids"]
    tokens = model.generate(prompt, **settings)
    assert torch.equal(tokens, expected.generate(prompt, **settings, use_cache=False))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
@pytest.mark.parametrize("heads", [{0: ALL_HEADS}, {1: ALL_HEADS}, {0: [1, 2], 1: [0]}], ids=str)
@pytest.mark.parametrize("cross_attention", [False, True])
def test_decoders_with_an_encoder_decoder_cache(model_type, heads, cross_attention):
    """Of decoders with cross-attention, the self-attention is pruned."""
    tiny = dataclasses.replace(ZOO[model_type], task="LMHeadModel")
    # Transformers 4 cannot make BERT's causal mask in float64.
    model = tiny.model(torch.float32, is_decoder=True, add_cross_attention=cross_attention)
    expected = masked(model, tiny, heads, {})
    model.prune_heads(heads)
    batch = {**tiny.batch(), **({"encoder_hidden_states": torch.ones(3, 5, 16)} if cross_attention else {})}
    torch.testing.assert_close(model(**batch, use_cache=True).logits, expected(**batch, use_cache=False).logits)


def test_pickled_and_copied(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    apply_plan(model, PruningPlan.for_model(model, heads={0: ALL_HEADS, 1: [1]}, neurons={1: ALL_NEURONS}))
    expected = logits(model, tiny)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        torch.testing.assert_close(logits(other, tiny), expected, rtol=0, atol=1e-12)


def test_pruned_after_recording_attention_maps(model_type):
    """Transformers 4 leaves the dense forward methods in the modules when it has recorded attention maps."""
    tiny = ZOO[model_type]
    model = tiny.model(attn_implementation="eager")
    heads, neurons = {0: ALL_HEADS, 1: [0]}, {0: [3], 1: ALL_NEURONS}
    expected = logits(masked(model, tiny, heads, neurons), tiny)
    model(**tiny.batch(), output_attentions=True)
    apply_plan(model, PruningPlan.for_model(model, heads=heads, neurons=neurons))
    torch.testing.assert_close(logits(model, tiny), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "mpnet", "t5"])
def test_models_dispatched_by_accelerate(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    heads, neurons = {0: ALL_HEADS, 1: [0]}, {0: [3], 1: ALL_NEURONS}
    expected = logits(masked(model, tiny, heads, neurons), tiny)
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    apply_plan(model, PruningPlan.for_model(model, heads=heads, neurons=neurons))
    torch.testing.assert_close(logits(model, tiny), expected, rtol=0, atol=1e-10)


def test_offloaded_weights_are_refused():
    model = cpu_offload(make_model())
    with pytest.raises(ValueError, match="query' are not in memory but offloaded.*Nothing was pruned"):
        model.prune_heads({0: [0]})


def test_a_config_that_another_model_pruned_is_refused():
    """Two models of one config would overwrite each other's record."""
    config = BertConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=2, intermediate_size=8)
    first, second = BertModel(config), BertModel(config)
    apply_plan(first, PruningPlan.for_model(first, heads={0: [0]}, neurons={1: [0]}))
    for plan in ({0: [3]}, {1: [3]}):
        with pytest.raises(ValueError, match="config of this BertModel says that layer .*deepcopy"):
            second.prune_heads(plan)
    first.prune_heads({0: [1]})
    assert first.config.pruned_heads == {0: [0, 1]}


def test_part_of_a_model_can_be_pruned():
    model = make_model()
    model.bert.prune_heads({0: [0]})
    model.prune_heads({0: [1]})
    assert model.config.pruned_heads == {0: [0, 1]}
    assert model.bert.encoder.layer[0].attention.self.query.out_features == 8


def test_plans_of_tensors_and_of_strings():
    """Whatever holds whole numbers names what it names; nothing else is taken."""
    model = make_model()
    plan = PruningPlan.for_model(model, heads={"1": torch.tensor([1, 0])}, neurons={0: torch.arange(3)})
    assert plan.heads == {1: [0, 1]} and plan.neurons == {0: [0, 1, 2]}
    apply_plan(model, plan)
    model.prune_heads({0: torch.tensor([2])})
    assert model.config.pruned_heads == {0: [2], 1: [0, 1]}
    with pytest.raises(TypeError, match="float"):
        PruningPlan.for_model(model, heads={0: [1.0]})


def test_keeps_dtype_hooks_and_requires_grad():
    model = make_model(dtype=torch.bfloat16)
    query, intermediate = (
        model.bert.encoder.layer[0].attention.self.query,
        model.bert.encoder.layer[0].intermediate.dense,
    )
    query.weight.requires_grad_(False)
    intermediate.bias.requires_grad_(False)
    calls = []
    query.register_forward_hook(lambda *_: calls.append(1))
    apply_plan(model, PruningPlan.for_model(model, heads={0: [0]}, neurons={0: [0]}))
    model(**make_batch())
    assert calls == [1]
    assert query.weight.dtype == intermediate.weight.dtype == torch.bfloat16
    assert not query.weight.requires_grad and query.bias.requires_grad
    assert intermediate.weight.requires_grad and not intermediate.bias.requires_grad


def test_no_gradient_is_awaited_that_cannot_come(model_type):
    """DistributedDataParallel waits for every parameter that requires a gradient."""
    tiny = ZOO[model_type]
    model = tiny.model()
    without = {name for name, p in model.named_parameters() if not _has_gradient(model, tiny, name, p)}
    apply_plan(model, PruningPlan.for_model(model, heads={0: ALL_HEADS}, neurons={0: ALL_NEURONS, 1: ALL_NEURONS}))
    model.zero_grad()
    logits(model, tiny).square().sum().backward()
    waiting = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert waiting <= without


def _has_gradient(model, tiny, name, parameter):
    if parameter.grad is None:
        logits(model, tiny).square().sum().backward()
    return parameter.grad is not None


def test_training_a_pruned_model(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    apply_plan(model, PruningPlan.for_model(model, heads={0: [1], 1: ALL_HEADS}, neurons={0: ALL_NEURONS, 1: [3]}))
    model.train()
    before = logits(model.eval(), tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    logits(model.train(), tiny).square().sum().backward()
    optimizer.step()
    assert not torch.equal(logits(model.eval(), tiny), before)


def test_base_model_without_head():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**{"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}))
    model.prune_heads({0: [0, 1]})
    assert model.encoder.layer[0].attention.self.query.weight.shape == (8, 16)


def untouched(model, before):
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()) and not getattr(
        model.config, "pruned_heads", None
    )


@pytest.mark.parametrize("heads", [{LAYERS: [0]}, {-1: [0]}, {0: [HEADS]}, {1: [0], 0: [-1]}], ids=str)
def test_out_of_range_changes_nothing(heads):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Nothing was pruned"):
        prune_heads(model, heads)
    assert untouched(model, before)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"neurons": {LAYERS: [0]}}, "the model has layers 0 to 1. Nothing was pruned"),
        ({"neurons": {0: [NEURONS]}}, r"neurons \[24\] of layer 0: they are numbered 0 to 23"),
        ({"neurons": {0: [3, 3]}}, "names a neuron of layer 0 twice"),
        ({"neurons": {0: [3]}, "num_neurons": [NEURONS, NEURONS - 1]}, "this model as it is now"),
        ({"heads": {0: [0, 0]}}, "names a head of layer 0 twice"),
        ({"model_type": "roberta"}, "is for a 'roberta'"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(change, message):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    plan = dataclasses.replace(PruningPlan.for_model(model, heads={1: [0]}, neurons={1: [0]}), **change)
    with pytest.raises(ValueError, match=message):
        apply_plan(model, plan)
    assert untouched(model, before)


def quantize(model):
    dense = model.bert.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)


def wrap(model):
    model.bert.encoder.layer[1].output.dense = nn.utils.parametrizations.weight_norm(nn.Linear(NEURONS, 16))


def tie(model):
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight


@pytest.mark.parametrize(
    "change, message",
    [
        (quantize, "'encoder.layer.1.output.dense' is a Linear of dtype torch.int8.*Prune before quantizing"),
        (wrap, "'encoder.layer.1.output.dense' is a ParametrizedLinear.*merge adapters"),
        (tie, "'encoder.layer.1.intermediate.dense' shares a weight with 'encoder.layer.0.intermediate.dense'"),
    ],
)
def test_weights_that_cannot_be_sliced_are_refused(change, message):
    model = make_model()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={1: [0]}))
    assert untouched(model, before)
    prune_heads(model, {1: [0]})  # The rest can be pruned.


def test_quantized_models_are_refused():
    model = make_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="is quantized .quant_method 'gptq'.; score and prune before quantizing"):
        model.prune_heads({0: [0]})


def test_unknown_architecture_names_the_supported_ones():
    model = BloomModel(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=10))
    with pytest.raises(ValueError, match="'bloom'.*albert, bart, bert, .*ARCHITECTURES"):
        prune_heads(model, {0: [0]})


def test_an_entry_for_ones_own_model(monkeypatch):
    class OwnConfig(BertConfig):
        model_type = "own"

    class OwnModel(BertModel):
        config_class = OwnConfig

    names = {
        "layers": "encoder.layer",
        "attention": "attention.self",
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "output": "attention.output.dense",
        "ffn_inputs": ("intermediate.dense",),
        "ffn_output": "output.dense",
    }
    model = OwnModel(OwnConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8))
    monkeypatch.setitem(ARCHITECTURES, "own", Architecture(**{**names, "key": "attention.self.keys"}))
    with pytest.raises(ValueError, match="'encoder.layer.0' of OwnModel has no module 'attention.self.keys'"):
        prune_heads(model, {0: [0]})
    monkeypatch.setitem(ARCHITECTURES, "own", Architecture(**{**names, "ffn_inputs": ("intermediate.dens",)}))
    with pytest.raises(ValueError, match=r"'encoder.layer.0.output.dense' of OwnModel reads 8 neurons, but \[\] give"):
        prune_heads(model, {0: [0]})
    monkeypatch.setitem(ARCHITECTURES, "own", Architecture(**names))
    apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={0: [0, 1]}))
    layer = model.encoder.layer[0]
    assert layer.attention.self.key.weight.shape == (12, 16) and layer.output.dense.weight.shape == (16, 6)
