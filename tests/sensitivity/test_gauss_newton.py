"""Gauss-Newton traces equal explicit J^T L J."""

import math
import re

import pytest
import torch
from explicit import explicit_gauss_newton, scored_weights, sum_by_component
from tiny import make_batch, make_model
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)
from zoo import HEADS, LAYERS

from hap_transformers import HapConfig, estimate_sensitivity
from hap_transformers.sensitivity import ghost_norms, output_curvature


EXACT = {"rtol": 1e-9, "atol": 1e-14}


def scored_batch(num_labels=2, size=5, length=7, seed=0):
    """A padded batch with labels for classification, or for regression if there is one label."""
    batch = make_batch(size, length, seed)
    batch["input_ids"] = batch["input_ids"] * batch["attention_mask"]
    generator = torch.Generator().manual_seed(seed)
    if num_labels == 1:
        batch["labels"] = torch.randn(size, generator=generator, dtype=torch.float64)
    else:
        batch["labels"] = torch.randint(0, num_labels, (size,), generator=generator)
    return batch


def assert_traces(result, heads, neurons, **tolerance):
    torch.testing.assert_close(torch.stack(result.traces["heads"]), heads, **(tolerance or EXACT))
    torch.testing.assert_close(torch.stack(result.traces["neurons"]), neurons, **(tolerance or EXACT))


@pytest.fixture(params=["ghost", "direct"])
def form(request, monkeypatch):
    monkeypatch.setattr(ghost_norms, "prefers_ghost", lambda *_: request.param == "ghost")
    monkeypatch.setattr("hap_transformers.sensitivity.gauss_newton.prefers_ghost", lambda *_: request.param == "ghost")


@pytest.mark.parametrize("chunk", [1, 100, 2000])
def test_chunks_change_nothing(form, chunk, monkeypatch):
    model, batch = make_model(), scored_batch()
    expected = estimate_sensitivity(model, [batch], method="gauss_newton_trace", progress=False)
    monkeypatch.setattr(ghost_norms, "CHUNK", chunk)
    result = estimate_sensitivity(model, [batch], method="gauss_newton_trace", progress=False)
    assert_traces(result, torch.stack(expected.traces["heads"]), torch.stack(expected.traces["neurons"]))


@pytest.mark.parametrize("num_labels", [2, 5, 1], ids=["2 classes", "5 classes", "regression"])
def test_equals_the_explicit_matrix(scored_model_type, num_labels, form):
    model, batch = make_model(scored_model_type, num_labels=num_labels), scored_batch(num_labels)
    labels = batch["labels"]
    loss = F.cross_entropy if num_labels > 1 else lambda logits, y: F.mse_loss(logits[:, 0], y)
    heads, neurons = explicit_gauss_newton(model, batch, lambda logits: loss(logits, labels))
    result = estimate_sensitivity(model, [batch], method="gauss_newton_trace", progress=False)
    assert_traces(result, heads, neurons)
    assert result.num_probes == 0
    squares = {name: weight**2 for name, weight in scored_weights(model).items()}
    sizes = {name: torch.ones_like(weight) for name, weight in squares.items()}
    for scores, traces, norms, counts in zip(
        (result.heads, result.neurons),
        (heads, neurons),
        sum_by_component(model, squares),
        sum_by_component(model, sizes),
        strict=True,
    ):
        torch.testing.assert_close(torch.stack(scores), traces / (2 * counts) * norms)


def test_few_classes_can_be_sampled():
    """Signs are random: the mean of many mixtures is near the explicit matrix, and two single ones differ."""
    model, batch = make_model(num_labels=5), scored_batch(5)
    heads, neurons = explicit_gauss_newton(model, batch, lambda logits: F.cross_entropy(logits, batch["labels"]))
    settings = {"method": "gauss_newton_trace", "exact_directions": 3, "progress": False}
    result = estimate_sensitivity(model, [batch], num_probes=1000, **settings)
    assert result.num_probes == 1000
    assert_traces(result, heads, neurons, rtol=0.25, atol=0)
    few = [estimate_sensitivity(model, [batch], num_probes=1, seed=seed, **settings).heads[0] for seed in (0, 1)]
    assert not torch.allclose(*few, rtol=1e-3)


@pytest.mark.parametrize("value", [-1, "3", None, 1.5, True, math.nan], ids=repr)
def test_directions_that_are_no_number(value):
    message = f"`exact_directions` must be a whole number.* got {re.escape(repr(value))}"
    with pytest.raises(ValueError, match=message):
        HapConfig(exact_directions=value)
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(make_model(), [scored_batch(2)], exact_directions=value, progress=False)


def test_custom_loss():
    """The custom loss has a temperature and class weights."""
    model, batch = make_model(num_labels=3), scored_batch(3)
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)

    def loss(logits):
        return F.cross_entropy(logits / 2, batch["labels"], weight=weights) + 0.1 * F.softplus(logits).sum(1).mean()

    heads, neurons = explicit_gauss_newton(model, batch, loss)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    result = estimate_sensitivity(
        model, [inputs], loss_fn=lambda m, b: loss(m(**b).logits), method="gauss_newton_trace", progress=False
    )
    assert_traces(result, heads, neurons)


def test_batches_weigh_by_examples():
    """Neither padding to other lengths nor other batches change the traces."""
    model, batch = make_model(), scored_batch(size=5)
    heads, neurons = explicit_gauss_newton(model, batch, lambda logits: F.cross_entropy(logits, batch["labels"]))
    padded = {name: value[3:] for name, value in batch.items()}
    for name in ("input_ids", "attention_mask"):
        padded[name] = F.pad(padded[name], (0, 4))
    result = estimate_sensitivity(
        model, [{k: v[:3] for k, v in batch.items()}, padded], method="gauss_newton_trace", progress=False
    )
    assert_traces(result, heads, neurons)


def test_standard_error_is_that_of_the_mean_over_examples():
    model, batch = make_model(), scored_batch(size=6)
    single = [
        estimate_sensitivity(
            model, [{k: v[i : i + 1] for k, v in batch.items()}], method="gauss_newton_trace", progress=False
        )
        for i in range(6)
    ]
    result = estimate_sensitivity(model, [batch], method="gauss_newton_trace", progress=False)
    for kind in ("heads", "neurons"):
        values = torch.stack([torch.stack(s.traces[kind]) for s in single])
        expected = values.std(0) / 6**0.5
        torch.testing.assert_close(torch.stack(result.stderr[kind]), expected)


def test_feed_forward_blocks_in_chunks_are_summed_before_they_are_squared():
    model, batch = make_model(), scored_batch(length=8)
    heads, neurons = explicit_gauss_newton(model, batch, lambda logits: F.cross_entropy(logits, batch["labels"]))
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 2
    assert_traces(estimate_sensitivity(model, [batch], method="gauss_newton_trace", progress=False), heads, neurons)


TOKENS = {"num_labels": 3, "hidden_size": 16, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}


def make_token_model(model_class=BertForTokenClassification, **sizes):
    torch.manual_seed(0)
    config = BertConfig(**{**TOKENS, "intermediate_size": 24, "vocab_size": 40, **sizes})
    model = model_class(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_few_outputs_at_several_positions_are_exact():
    """Eight start logits and eight end logits: two softmaxes, rank seven each."""
    model, batch = make_token_model(BertForQuestionAnswering, num_labels=2), make_batch(length=8)
    positions = {"start_positions": torch.tensor([1, 0, 4]), "end_positions": torch.tensor([3, 2, 4])}
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    weights = scored_weights(model)

    def logits_of(values):
        outputs = torch.func.functional_call(model, values, (), inputs)
        return torch.cat([outputs.start_logits, outputs.end_logits], 1)

    def loss(logits):
        start, end = logits.split(8, 1)
        losses = F.cross_entropy(start, positions["start_positions"]), F.cross_entropy(end, positions["end_positions"])
        return sum(losses) / 2

    logits = logits_of(weights).detach()
    hessian = torch.func.hessian(loss)(logits).reshape(logits.numel(), -1)
    diagonals = {}
    for name, jacobian in torch.func.jacrev(logits_of)(weights).items():
        flat = jacobian.reshape(logits.numel(), -1)
        diagonals[name] = ((hessian @ flat) * flat).sum(0).reshape(weights[name].shape)
    result = estimate_sensitivity(model, [{**inputs, **positions}], method="gauss_newton_trace", progress=False)
    assert result.num_probes == 0
    assert_traces(result, *sum_by_component(model, diagonals))


def assert_unbiased(model, batch, expected):
    """Means of repeated runs lie within 4.5 standard errors of the explicit traces of heads and neurons."""
    runs = [
        estimate_sensitivity(model, [batch], num_probes=50, seed=seed, method="gauss_newton_trace", progress=False)
        for seed in range(24)
    ]
    assert runs[0].num_probes == 50
    for kind, exact in zip(("heads", "neurons"), expected, strict=True):
        traces = torch.stack([torch.stack(run.traces[kind]) for run in runs])
        error = traces.std(0) / len(runs) ** 0.5
        assert ((traces.mean(0) - exact).abs() < 4.5 * error).all()
        assert (error < 0.1 * exact.abs().max()).all()  # The band above is not trivially wide.


@pytest.mark.any_release
@pytest.mark.parametrize("classes", ["explicit", "softmax"])
def test_many_outputs_are_sampled_without_bias(classes, monkeypatch):
    """Token classification has 24 directions per example. Both roots agree with the explicit matrix."""
    if classes == "softmax":
        monkeypatch.setattr(output_curvature, "EXPLICIT_CLASSES", 1)
    model, batch = make_token_model(num_hidden_layers=1), make_batch(size=3, length=12)
    labels = torch.randint(0, 3, (3, 12), generator=torch.Generator().manual_seed(1))
    batch["labels"] = labels.masked_fill(batch["attention_mask"] == 0, -100)
    expected = explicit_gauss_newton(
        model, batch, lambda logits: F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    )
    assert_unbiased(model, batch, expected)


def test_a_language_model():
    """Labels are shifted, and the vocabulary is too large to form its Hessian."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_head=4, n_layer=1, n_inner=24, n_positions=8, vocab_size=70, bos_token_id=0)
    config.eos_token_id = 0
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 70, (2, 4), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    expected = explicit_gauss_newton(
        model, batch, lambda logits: F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
    assert_unbiased(model, batch, expected)


@pytest.mark.any_release
def test_a_softmax_that_is_sure_of_most_positions():
    """A position without curvature does not show its weight, which must not be invented."""
    logits = torch.randn(2, 6, 100, generator=torch.Generator().manual_seed(0))
    logits[:, :4] *= 60
    logits.requires_grad_()
    loss = F.cross_entropy(logits.flatten(0, 1), torch.arange(12))
    directions = output_curvature.output_directions(loss, [logits], 2, 2000, torch.Generator().manual_seed(0))
    second = sum(cotangent[0][:, 4] ** 2 for cotangent in directions.cotangents) / directions.count
    probabilities = logits[:, 4].softmax(-1)
    expected = (probabilities - probabilities**2) * 2 / 12  # Two examples, twelve positions.
    torch.testing.assert_close(second.sum(1), expected.sum(1).detach(), rtol=0.1, atol=0)


def model_logits(model, batch):
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


@pytest.mark.parametrize(
    "loss_fn, message",
    [
        (lambda m, b: model_logits(m, b).mean(), "linear in the model's logits"),
        (lambda m, b: -model_logits(m, b).square().mean(), "not convex"),
        (lambda m, b: model_logits(m, b).mean(0).square().sum(), r"couples examples or positions\. Use"),
        (
            lambda m, b: m.bert(b["input_ids"]).last_hidden_state.square().mean(),
            "No output of BertForSequenceClassification leads to the loss",
        ),
        (lambda m, b: model_logits(m, b).square().mean() + m(**b).loss, "more than once"),
        (lambda m, b: (model_logits(m, b), m.classifier.weight.square().sum().requires_grad_())[1], "does not depend"),
    ],
)
def test_unsuitable_losses_are_refused(loss_fn, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(model, [make_batch()], loss_fn=loss_fn, method="gauss_newton_trace", progress=False)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", ["deberta-v2", "deberta-v3", "llama", "modernbert"])
def test_other_shapes_of_blocks(model_type):
    """Heads are grouped and neurons gated, or both are fused, or all examples share positions. Positions have their
    own projections in DeBERTa-v2, and use those of queries and keys in v3."""
    model, batch = make_model(model_type), scored_batch()
    result = estimate_sensitivity(model, [batch], method="gauss_newton_trace", progress=False)
    heads, neurons = explicit_gauss_newton(model, batch, lambda logits: F.cross_entropy(logits, batch["labels"]))
    # DeBERTa's loss and the others' norms and position encodings are always in float32.
    assert_traces(result, heads, neurons, rtol=1e-5, atol=1e-9)


def test_no_memory_is_kept_from_batch_to_batch():
    """A reference cycle in the graph's hooks would keep every batch until the garbage collector runs."""
    import gc

    model = make_model()
    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(3):
            estimate_sensitivity(model, [make_batch()] * 3, method="gauss_newton_trace", progress=False)
            counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sure", [10.0, 15.0, 17.0, 19.0])
def test_many_classes_of_which_one_is_nearly_certain(sure, dtype):
    """The curvature of 1,000 classes may be as small as the loss's rounding; it is no other loss for that."""
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = sure
    logits = logits.to(dtype)
    own = logits.double().softmax(-1)
    logits.requires_grad_()
    for seed in range(10):
        # As in Transformers, whose causal models compute the loss in float32 whatever the logits are of.
        loss = -(logits.float().log_softmax(-1) * own.float()).sum(-1).mean()
        generator = torch.Generator().manual_seed(seed)
        directions = output_curvature.output_directions(loss, [logits], len(logits), 100, generator)
        drawn = torch.stack([cotangent for (cotangent,) in directions.cotangents]).double()
        expected, found = (own * (1 - own)).sum(), drawn.square().sum((1, 2)).mean()
        assert (found - expected).abs() <= 0.4 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_loss_of_many_positions_is_not_taken_for_rounding(dtype):
    """A mean over positions has a small curvature in each, which is no reason to fit anything to it."""
    logits = torch.randn(2, 256, 500, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    warm = logits.float() / 4
    loss = -(warm.detach().softmax(-1) * warm.log_softmax(-1)).sum(-1).mean()
    with pytest.raises(ValueError, match="cannot be factored"):
        output_curvature.output_directions(loss, [logits], 2, 4, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("confident", [5.0, 6.0, 7.0, 8.0])
def test_one_uncertain_example_among_confident_ones(confident):
    """Its product with a random vector may be as small as what bf16 drops; the loss is no other for that."""
    logits = torch.zeros(32, 10)
    logits[:, 0], logits[0, :2] = confident, 10.0
    logits = logits.bfloat16().requires_grad_()
    own = logits.detach().double().softmax(-1)
    expected = torch.diag_embed(own) - own[:, :, None] * own[:, None]
    for seed in range(15):
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.zeros(32, dtype=torch.long))
        generator = torch.Generator().manual_seed(seed)
        directions = output_curvature.output_directions(loss, [logits], len(logits), 4, generator)
        drawn = torch.stack([cotangent for (cotangent,) in directions.cotangents]).double()
        assert directions.num_probes == 0
        assert (torch.einsum("kbc,kbd->bcd", drawn, drawn) - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize("failure", ["error", "NaN"])
def test_very_confident_predictions_of_many_classes(monkeypatch, failure):
    """The numbers of one position's Hessian may be too far apart to be factored in float32, on some machines."""
    logits = 60 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    own = logits.double().softmax(-1)
    expected = torch.diag_embed(own) - own[:, :, None] * own[:, None]
    eigh = torch.linalg.eigh

    def fails_in_float32(matrices):
        if matrices.dtype == torch.float32 and failure == "error":
            raise torch.linalg.LinAlgError
        values, columns = eigh(matrices)
        return (values * torch.nan, columns) if matrices.dtype == torch.float32 else (values, columns)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    logits.requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(64))
    directions = output_curvature.output_directions(loss, [logits], 64, 4, torch.Generator().manual_seed(0), 64)
    drawn = torch.stack([cotangent for (cotangent,) in directions.cotangents]).double()
    assert directions.num_probes == 0
    torch.testing.assert_close(torch.einsum("kbc,kbd->bcd", drawn, drawn), expected, rtol=1e-4, atol=1e-5)
