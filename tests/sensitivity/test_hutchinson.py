"""Hutchinson's traces against the explicit Hessian."""

import pytest
import torch
from conftest import HEADS, LAYERS, make_batch, make_model

from hap_transformers import estimate_sensitivity


ROLES = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]


@pytest.fixture(scope="module")
def small():
    """A BERT small enough for its Hessian, with one batch."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "attn_implementation": "eager"}
    return make_model(**sizes), make_batch()


def explicit_traces(model, batch):
    """Per layer: Tr(H_cc), number of weights and squared norm of each head, from `torch.func.hessian`."""
    names = [
        f"bert.encoder.layer.{layer}.{role}.{kind}"
        for layer in range(LAYERS)
        for role in ROLES
        for kind in ("weight", "bias")
        if (role, kind) != ("attention.output.dense", "bias")
    ]
    weights = {name: model.get_parameter(name).detach() for name in names}

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (), batch).loss

    traces = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    sizes, norms = torch.zeros_like(traces), torch.zeros_like(traces)
    hessians = torch.func.hessian(loss, argnums=tuple(range(len(names))))(*weights.values())
    for i, name in enumerate(names):
        layer = int(name.split(".")[3])
        count = weights[name].numel()
        diagonal = hessians[i][i].reshape(count, count).diagonal().view(weights[name].shape)
        along_columns = name.endswith("output.dense.weight")
        for target, values in ((traces, diagonal), (sizes, torch.ones_like(diagonal)), (norms, weights[name] ** 2)):
            values = values.T if along_columns else values
            target[layer] += values.reshape(HEADS, -1).sum(1)
    return traces, sizes, norms


def test_agrees_with_the_explicit_hessian(small):
    model, batch = small
    traces, sizes, norms = explicit_traces(model, batch)
    result = estimate_sensitivity(model, [batch], "hessian_trace", num_probes=2000, progress=False)
    estimated, stderr = torch.stack(result.head_traces), torch.stack(result.head_stderr)
    assert ((estimated - traces).abs() < 4 * stderr).all()
    assert (stderr < 0.2 * traces.abs().max()).all()  # The band above is not trivially wide.
    torch.testing.assert_close(torch.stack(result.heads), estimated * norms / (2 * sizes))


def test_exact_for_a_diagonal_hessian(small):
    """v * Hv has no noise where the Hessian is diagonal: the loss sum of w^3 has Tr(H_cc) = sum of 6 w."""
    model, batch = small
    weights = [
        parameter
        for layer in model.bert.encoder.layer
        for role in ROLES
        for kind, parameter in layer.get_submodule(role).named_parameters()
        if (role, kind) != ("attention.output.dense", "bias")
    ]
    result = estimate_sensitivity(
        model, [batch], num_probes=2, loss_fn=lambda *_: sum((w**3).sum() for w in weights), progress=False
    )
    layer = model.bert.encoder.layer[1].attention
    expected = sum(
        (6 * parameter).view(HEADS, -1).sum(1)
        for linear in (layer.self.query, layer.self.key, layer.self.value)
        for parameter in (linear.weight, linear.bias)
    ) + (6 * layer.output.dense.weight).T.reshape(HEADS, -1).sum(1)
    torch.testing.assert_close(result.head_traces[1], expected.detach())
    assert torch.stack(result.head_stderr).abs().max() < 1e-12
    assert result.reliability == pytest.approx(1)


def test_batches_of_different_sizes_weigh_by_examples(small):
    """Two batches must give the mean over their examples: here, the one-batch answer with the same probes' noise."""
    model, _ = small
    batch = make_batch(size=5, length=6)
    parts = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    whole = estimate_sensitivity(model, [batch], num_probes=800, progress=False)
    split = estimate_sensitivity(model, parts, num_probes=800, seed=1, progress=False)
    traces = explicit_traces(model, batch)[0]
    assert split.num_examples == whole.num_examples == 5
    assert ((torch.stack(split.head_traces) - traces).abs() < 5 * torch.stack(whole.head_stderr)).all()


def test_sdpa_and_eager_agree():
    batch = make_batch()
    results = [
        estimate_sensitivity(make_model(attn_implementation=kernel), [batch], num_probes=2, progress=False).heads
        for kernel in ("eager", "sdpa")
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_flash_attention_is_refused():
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa' or 'eager'"):
        estimate_sensitivity(model, [make_batch()], "hessian_trace", progress=False)
