"""Hutchinson's traces agree with the explicit Hessian."""

import pytest
import torch
from explicit import scored_weights, sum_by_component
from tiny import make_batch, make_model

from hap_transformers import estimate_sensitivity


@pytest.fixture(scope="module")
def small():
    """A BERT small enough for its Hessian, with one batch and the block traces of heads and neurons."""
    model = make_model(hidden_size=8, intermediate_size=12, attn_implementation="eager")
    batch = make_batch()
    return model, batch, explicit_traces(model, batch)


def of_one_layer():
    """A model for what does not depend on the number of layers, and takes many passes."""
    return make_model(hidden_size=8, intermediate_size=12, num_hidden_layers=1, attn_implementation="eager")


def explicit_traces(model, batch):
    """Diagonals of the Hessian, weight by weight, summed up."""
    weights, diagonals = scored_weights(model), {}
    for name, weight in weights.items():

        def loss(value, name=name):
            return torch.func.functional_call(model, {**weights, name: value}, (), batch).loss

        hessian = torch.func.hessian(loss)(weight).reshape(weight.numel(), weight.numel())
        diagonals[name] = hessian.diagonal().view(weight.shape)
    return sum_by_component(model, diagonals)


def stacked(result, name):
    """Heads and neurons of all layers in one vector."""
    return torch.cat([torch.cat(getattr(result, name)[kind]) for kind in ("heads", "neurons")])


@pytest.mark.any_release
def test_agrees_with_the_explicit_hessian(small):
    model, batch, (heads, neurons) = small
    traces = torch.cat([heads.flatten(), neurons.flatten()])
    result = estimate_sensitivity(model, [batch], "hessian_trace", num_probes=500, progress=False)
    stderr = stacked(result, "stderr")
    assert ((stacked(result, "traces") - traces).abs() < 4 * stderr).all()
    assert (stderr < 0.2 * traces.abs().max()).all()  # The band above is not trivially wide.
    weights = scored_weights(model)
    for scores, estimated, norms, sizes in zip(
        (result.heads, result.neurons),
        (result.traces["heads"], result.traces["neurons"]),
        sum_by_component(model, {name: weight**2 for name, weight in weights.items()}),
        sum_by_component(model, {name: torch.ones_like(weight) for name, weight in weights.items()}),
        strict=True,
    ):
        torch.testing.assert_close(torch.stack(scores), torch.stack(estimated) * norms / (2 * sizes))


@pytest.mark.any_release
def test_reported_standard_error_is_the_spread_of_repeated_runs():
    model, batch = of_one_layer(), make_batch()
    runs = [
        estimate_sensitivity(model, [batch], "hessian_trace", num_probes=3, seed=seed, progress=False)
        for seed in range(200)
    ]
    spread = torch.stack([stacked(run, "traces") for run in runs]).std(0)
    reported = torch.stack([stacked(run, "stderr") for run in runs]).square().mean(0).sqrt()
    torch.testing.assert_close(reported, spread, rtol=0.2, atol=0)


def test_layers_that_share_weights_are_refused(small):
    model, batch, _ = small
    with pytest.raises(ValueError, match="Linear is called more than once"):
        estimate_sensitivity(
            model, [batch], "hessian_trace", loss_fn=lambda m, b: m(**b).loss + m(**b).loss, progress=False
        )


def test_a_loss_without_the_model_is_refused(small):
    model, batch, _ = small
    for loss_fn in (lambda m, b: m.classifier.weight.sum(), lambda m, b: m(**b).loss.detach()):
        with pytest.raises(ValueError, match="does not depend on the model's weights"):
            estimate_sensitivity(model, [batch], "hessian_trace", loss_fn=loss_fn, progress=False)


@pytest.mark.any_release
def test_batches_of_different_sizes_weigh_by_examples():
    """Two batches give the mean over their examples."""
    model = of_one_layer()
    batch = make_batch(size=5, length=6)
    parts = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    whole = estimate_sensitivity(model, [batch], "hessian_trace", num_probes=300, progress=False)
    split = estimate_sensitivity(model, parts, "hessian_trace", num_probes=300, seed=1, progress=False)
    heads, neurons = explicit_traces(model, batch)
    traces = torch.cat([heads.flatten(), neurons.flatten()])
    assert split.num_examples == whole.num_examples == 5
    assert ((stacked(split, "traces") - traces).abs() < 5 * stacked(whole, "stderr")).all()


@pytest.mark.any_release
@pytest.mark.parametrize("reduction", ["examples", "tokens"])
def test_large_batches(reduction, monkeypatch):
    """A batch is split only if its loss is a mean over examples, not if it is a mean over tokens."""
    monkeypatch.setattr("hap_transformers.sensitivity.hutchinson.EXAMPLES_A_GRAPH", 3)
    model = of_one_layer()
    batch = make_batch(size=5)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0] if reduction == "examples" else [1.0, 5.0, 0.0, 2.0, 9.0])

    def loss_fn(m, b):
        labels = b["labels"]
        part = weights[b["index"]].double()
        losses = torch.nn.functional.cross_entropy(m(input_ids=b["input_ids"]).logits, labels, reduction="none")
        return (losses * part).sum() / part.sum().clamp_min(1e-9)

    indexed = {**batch, "index": torch.arange(5)}
    result = estimate_sensitivity(model, [indexed], "hessian_trace", num_probes=500, loss_fn=loss_fn, progress=False)
    values, diagonals = scored_weights(model), {}
    for name, weight in values.items():

        def loss(value, name=name):
            return loss_fn(
                lambda **inputs: torch.func.functional_call(model, {**values, name: value}, (), inputs), indexed
            )

        diagonals[name] = torch.func.hessian(loss)(weight).reshape(weight.numel(), -1).diagonal().view(weight.shape)
    traces = torch.cat([part.flatten() for part in sum_by_component(model, diagonals)])
    stderr = stacked(result, "stderr")
    assert ((stacked(result, "traces") - traces).abs() < 4 * stderr).all()
    assert (stderr < 0.2 * traces.abs().max()).all()


def test_sdpa_and_eager_agree():
    batch = make_batch()
    results = [
        estimate_sensitivity(
            make_model(attn_implementation=kernel), [batch], "hessian_trace", num_probes=2, progress=False
        ).heads
        for kernel in ("eager", "sdpa")
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_flash_attention_is_refused():
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' or 'eager'"):
        estimate_sensitivity(model, [make_batch()], "hessian_trace", progress=False)


def test_the_gauss_newton_trace_needs_no_second_derivative():
    """Fused attention has no second derivative, and the Gauss-Newton pass runs with it."""
    batch = make_batch()
    results = [
        estimate_sensitivity(
            make_model(attn_implementation=kernel), [batch], "gauss_newton_trace", progress=False
        ).traces
        for kernel in ("eager", "sdpa")
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
