"""A change of basis inside heads leaves the model's function as it is, and does what it is for."""

import copy
import dataclasses
import pickle
import types

import pytest
import torch
from explicit import explicit_factors
from tiny import make_batch, make_batches, make_model
from torch import nn
from zoo import HEADS, LAYERS, ZOO, logits

from hap_transformers import ARCHITECTURES, PruningPlan, apply_plan
from hap_transformers.alignment.align_heads import align_heads
from hap_transformers.components import slicing
from hap_transformers.components.projections import Projection


def align(model, batches, **settings):
    align_heads(model, batches, progress=False, **settings)


def batches_of(tiny, count=2):
    """Batches that models know a loss for without labels, or with some."""
    batches = make_batches(tiny, count)
    return [{**batch, "labels": torch.arange(8) % 2} for batch in batches] if tiny.family == "Whisper" else batches


def exact_norms(model):
    """Lets norms that work in float32 work in the model's precision."""

    def forward(self, states):
        return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = types.MethodType(forward, module)
    return model


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    """Whether a model has exactly these weights."""
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def pruned(model):
    """A model with fewer dimensions, and without a whole head and a whole attention."""
    group = {"query_key_dims": {0: [0]}, "value_dims": {0: [1]}}
    plan = PruningPlan.for_model(model, heads={0: [HEADS - 1]}, neurons={0: [3]})
    apply_plan(model, plan)
    apply_plan(model, PruningPlan.for_model(model, **group))
    return model


@pytest.mark.parametrize("smaller", [False, True], ids=["dense", "pruned"])
def test_logits_are_equal(model_type, smaller):
    tiny = ZOO[model_type]
    model = exact_norms(tiny.model())
    if smaller:
        model = pruned(model)
    expected, before = logits(model, tiny), weights(model)
    align(model, batches_of(tiny))
    torch.testing.assert_close(logits(model, tiny), expected, rtol=1e-10, atol=1e-10)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    bilinear = ARCHITECTURES[model.config.model_type].names["heads"].bilinear
    for layer in range(LAYERS):
        paths = (*tiny.heads_in, tiny.heads_out) if bilinear else (tiny.heads_in[2], tiny.heads_out)
        assert {f"{tiny.layer.format(layer)}.{path}.weight" for path in paths} <= changed
    allowed = (*tiny.heads_in, tiny.heads_out, "pos_key_proj", "pos_query_proj")
    decoder = ARCHITECTURES[model.config.model_type].decoder
    if decoder is not None:
        cross = decoder.cross_heads
        allowed += (cross.query, cross.key, cross.value, cross.output)
    assert all(name.removesuffix(".weight").removesuffix(".bias").endswith(allowed) for name in changed)
    assert len(model.config.aligned_heads) == 16


def test_the_name_of_the_basis_is_that_of_the_batches():
    model = make_model()
    names = []
    for seeds in ((0, 1), (0, 1), (2, 3)):
        other = copy.deepcopy(model)
        align(other, [make_batch(8, seed=seed) for seed in seeds])
        names.append(other.config.aligned_heads)
    assert names[0] == names[1] != names[2] and not hasattr(model.config, "aligned_heads")


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "deberta-v2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_changes_by_its_rounding(model_type, dtype):
    tiny = ZOO[model_type]
    model = tiny.model(dtype)
    exact = logits(copy.deepcopy(model).double(), tiny)
    align(model, [tiny.batch(8, dtype=dtype)])
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    moved = (logits(model.double(), tiny) - exact).norm() / exact.norm()
    assert 0 < moved < 8 * torch.finfo(dtype).eps


def inputs_and_outputs(model, batches, paths):
    """What modules read and gave at valid tokens of all batches."""
    seen = {path: ([], []) for path in paths}

    def noting(path, mask):
        def hook(module, args, output):
            chosen = torch.ones(output.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            for kept, tensor in zip(seen[path], (args[0], output), strict=True):
                kept.append(tensor[chosen].detach())

        return hook

    for batch in batches:
        handles = [
            model.get_submodule(path).register_forward_hook(noting(path, batch.get("attention_mask")))
            for path in paths
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return {path: tuple(torch.cat(kept) for kept in pair) for path, pair in seen.items()}


def off_diagonal(matrix):
    return (matrix - matrix.diagonal().diag()).abs().max() / matrix.diagonal().abs().max()


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("model_type", ["bert", "vit", "t5"])
def test_contexts_are_uncorrelated_and_their_curvature_is_diagonal(model_type, layer):
    """By hooks, and by explicit Jacobians of single examples; T5's projections have no biases."""
    tiny = ZOO[model_type]
    model, batch = tiny.model(), batches_of(tiny, 1)[0]
    path = f"{tiny.layer.format(layer)}.{tiny.heads_out}"

    def measured():
        module = model.get_submodule(path)
        moment, cotangents = explicit_factors(model, batch, module)
        curvature = module.weight.T @ cotangents @ module.weight
        size = len(moment) // HEADS
        runs = [slice(head * size, (head + 1) * size) for head in range(HEADS)]
        return [(moment[run, run], curvature[run, run].detach()) for run in runs]

    assert all(off_diagonal(A) > 1e-2 and off_diagonal(M) > 1e-2 for A, M in measured())
    align(model, [batch])
    for moment, curvature in measured():
        assert off_diagonal(moment) < 1e-4 and off_diagonal(curvature) < 1e-4
        torch.testing.assert_close(moment.diagonal(), torch.ones(len(moment)).double(), rtol=1e-3, atol=0)
        assert (curvature.diagonal().diff() <= 0).all()


def test_heads_that_share_values_have_one_basis():
    """The moment of a value head is the mean of its query heads' contexts, and its curvature is their sum."""
    tiny = ZOO["llama"]
    model, batches = tiny.model(), make_batches(tiny, 3)
    path = "model.layers.1.self_attn.o_proj"
    align(model, batches)
    contexts = inputs_and_outputs(model, batches, [path])[path][0].unflatten(1, (HEADS, 2, 4))
    for head in contexts.unbind(1):
        tokens = head.flatten(0, 1)
        moment = tokens.T @ tokens / len(head)  # The projection has a bias: means of either query head are taken off.
        moment -= torch.einsum("sd,se->de", head.mean(0), head.mean(0))
        assert off_diagonal(moment) < 1e-4


def test_queries_and_keys_have_the_same_diagonal_moments():
    model, batches = make_model(), [make_batch(8, seed=seed) for seed in range(4)]
    align(model, batches)
    paths = [f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "key")]
    outputs = inputs_and_outputs(model, batches, paths)
    queries, keys = (outputs[path][1].unflatten(1, (HEADS, -1)).unbind(1) for path in paths)
    for q, k in zip(queries, keys, strict=True):
        of_queries = q.T @ q / len(q)
        centred = k - k.mean(0)  # A softmax does not see what all keys have in common.
        of_keys = centred.T @ centred / len(k)
        torch.testing.assert_close(of_queries, of_keys, rtol=1e-3, atol=1e-4 * float(of_keys.max()))
        assert off_diagonal(of_queries) < 1e-4 and (of_queries.diagonal().diff() <= 0).all()


@pytest.mark.parametrize("model_type", ["bert", "deberta-v3"])
def test_batches_and_padding_do_not_matter(model_type):
    """DeBERTa projects relative positions by the same modules, also beside a single example."""
    tiny = ZOO[model_type]
    models, whole = [tiny.model() for _ in range(2)], batches_of(tiny, 1)[0]
    parts = [{name: tensor[i : i + 1] for name, tensor in whole.items()} for i in range(8)]
    parts = [{name: nn.functional.pad(tensor, (0, 2)) for name, tensor in part.items()} for part in parts]
    align(models[0], [whole])
    align(models[1], parts)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(first.abs(), second.abs(), rtol=1e-5, atol=1e-6)


def quantize(model):
    layer = model.bert.encoder.layer[1].attention.self
    layer.value.weight = nn.Parameter(layer.value.weight.to(torch.int8), requires_grad=False)


def tie(model):
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    second.query.weight = first.query.weight


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[1].attention.self.key)


def offload(model):
    layer = model.bert.encoder.layer[1].attention.output.dense
    layer.weight = nn.Parameter(layer.weight.to("meta"))


@pytest.mark.parametrize(
    "change, message",
    [
        (quantize, "'encoder.layer.1.attention.self.value' is a .* of dtype torch.int8"),
        (tie, "'encoder.layer.0.attention.self.query' shares a weight with 'encoder.layer.1.attention.self.query'"),
        (parametrize, "the weights of 'encoder.layer.1.attention.self.key' are computed from"),
        (offload, "weights of 'encoder.layer.1.attention.output.dense' are not in memory"),
    ],
)
def test_weights_that_cannot_be_changed_are_named_before_any_is(change, message):
    model = make_model()
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_meta}
    with pytest.raises(ValueError, match=message):
        align(model, [make_batch(8)])
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())


def test_sharded_weights_are_refused(monkeypatch):
    model = make_model()
    module, before = model.bert.encoder.layer[0].attention.self.key, weights(model)
    monkeypatch.setattr(slicing, "is_sharded", lambda found: found is module)
    with pytest.raises(ValueError, match=r"'encoder.layer.0.attention.self.key' each .FSDP."):
        align(model, [make_batch(8)])
    assert same(model, before)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "modernbert"])
def test_attention_that_does_more_than_multiply_is_named(model_type, monkeypatch):
    """A wrong entry of the table shows before the model has changed."""
    tiny = ZOO[model_type]
    entry = ARCHITECTURES[model_type]
    names = {**entry.names, "heads": dataclasses.replace(entry.names["heads"], bilinear=True)}
    monkeypatch.setitem(ARCHITECTURES, model_type, dataclasses.replace(entry, names=names))
    model = tiny.model(num_attention_heads=HEADS)
    before = weights(model)
    with pytest.raises(ValueError, match=rf"bilinear=False in .*ARCHITECTURES\['{model_type}'\]"):
        align(model, make_batches(tiny, 1))
    assert same(model, before) and not hasattr(model.config, "aligned_heads")


def test_undone_if_interrupted_while_weights_are_written(monkeypatch):
    model = make_model()
    before, write, written = weights(model), Projection.write, []

    def interrupted(self, matrix, bias):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(self.name)
        write(self, matrix, bias)

    monkeypatch.setattr(Projection, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        align(model, [make_batch(8)])
    assert len(written) == 3 and same(model, before) and not hasattr(model.config, "aligned_heads")


@pytest.mark.parametrize("batches", [[], iter(())], ids=["list", "iterator"])
def test_no_examples_are_refused(batches):
    model = make_model()
    before = weights(model)
    with pytest.raises(ValueError, match=r"[Nn]o (batches|examples)"):
        align(model, batches)
    assert same(model, before)


def test_moments_that_are_not_finite_are_named():
    model = make_model(num_hidden_layers=1)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.bias.fill_(1e200)
    before = weights(model)
    with pytest.raises(ValueError, match="not finite"):
        align(model, [make_batch(8)])
    assert same(model, before)


def test_weights_that_half_precision_does_not_hold():
    """Contexts hardly vary about a large bias, which becomes large in units of how much they do."""
    model = make_model(dtype=torch.float16)
    values = model.bert.encoder.layer[0].attention.self.value
    with torch.no_grad():
        values.weight.mul_(1e-3)
        values.bias.fill_(30)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layer.0.attention.self.value' .* too large for torch.float16"):
        align_heads(model, [make_batch()], progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_heads_stays_as_it_is():
    model = make_model()
    apply_plan(model, PruningPlan.for_model(model, heads={layer: range(HEADS) for layer in range(LAYERS)}))
    before = weights(model)
    align(model, [make_batch(8)])
    assert same(model, before)


def test_heads_that_give_nothing_and_constant_ones():
    """Their moments are singular: zero, and zero once centred."""
    model = make_model()
    attention = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        for projection in (attention.value, attention.query, attention.key):
            projection.weight[:4], projection.bias[:4] = 0, 0
        attention.value.weight[4:8] = 0
    expected = logits(model, ZOO["bert"])
    align(model, [make_batch(8)])
    torch.testing.assert_close(logits(model, ZOO["bert"]), expected, rtol=1e-10, atol=1e-10)


def test_modes_hooks_and_what_is_trained_are_as_before():
    model = make_model().train()
    model.bert.pooler.eval()
    frozen = model.bert.encoder.layer[0].attention.self.query.weight.requires_grad_(False)
    heard = []
    module = model.bert.encoder.layer[1].attention.output.dense
    module.register_forward_hook(lambda *_: heard.append(1))
    parameters = dict(model.named_parameters())
    align(model, [make_batch(8)])
    assert model.training and not model.bert.pooler.training and not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert all(parameters[name] is p and p.grad is None for name, p in model.named_parameters())
    heard.clear()
    model(**make_batch())
    assert len(heard) == 1 and len(module._forward_hooks) == 1 and not module._forward_pre_hooks
    assert pickle.dumps(model.config)


def test_compiled_models():
    torch.compiler.reset()
    eager, inside = make_model(), make_model()
    align(eager, [make_batch(8)])
    align(torch.compile(inside, backend="eager"), [make_batch(8)])
    assert same(inside, weights(eager))


@pytest.mark.parametrize("name, value", [("num_probes", 0), ("exact_directions", -1), ("exact_directions", 2.5)])
def test_numbers_of_directions_out_of_range(name, value):
    model = make_model()
    before = weights(model)
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        align(model, [make_batch(8)], **{name: value})
    assert same(model, before)


def test_an_overflow_in_fp16_lowers_the_loss_scale():
    """Curvatures of a loss so steep that 2^16 times it overflows fp16 are those of float32, to rounding."""

    def steep(model, batch):
        return 300 * model(**batch).loss

    dense = make_model(dtype=torch.float32)
    models = {precision: copy.deepcopy(dense) for precision in (None, "fp16")}
    for precision, model in models.items():
        align(model, [make_batch(size=4)], precision=precision, loss_fn=steep)
    for full, low in zip(*map(norms_by_dimension, models.values()), strict=True):
        assert (full - low).norm() < 0.05 * full.norm()


def norms_by_dimension(model):
    """The norm of the weights that read each dimension of the contexts, whose sign is arbitrary."""
    return [layer.attention.output.dense.weight.detach().norm(dim=0) for layer in model.bert.encoder.layer]


def test_batches_without_examples_are_skipped():
    model, other, batches = make_model(), make_model(), [make_batch(8, seed=seed) for seed in range(2)]
    align_heads(model, batches, progress=False)
    align_heads(other, [{name: values[:0] for name, values in batches[0].items()}, *batches], progress=False)
    for name, values in model.state_dict().items():
        assert torch.equal(values, other.state_dict()[name])
