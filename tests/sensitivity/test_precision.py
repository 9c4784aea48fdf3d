"""Low precision agrees with full precision."""

import functools

import pytest
import torch
from accelerate import Accelerator
from scipy.stats import spearmanr
from tiny import make_batch, make_model
from torch.nn import functional as F

from hap_transformers import estimate_sensitivity
from hap_transformers.sensitivity.precision import AttentionInFloat32, Precision


BATCHES = [make_batch(size=4, seed=seed) for seed in range(4)]
METHODS = ["gauss_newton_trace", "hessian_trace", "gradient", "fisher"]


def scores(result):
    return torch.cat(result.heads + result.neurons)


@functools.cache
def scores_in(precision, model_type, method):
    model = make_model(model_type, torch.float32)
    return scores(estimate_sensitivity(model, BATCHES, method, precision=precision, num_probes=8, progress=False))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision, error", [("bf16", 0.05), ("fp16", 0.01)])
def test_low_precision_agrees_with_full(method, precision, error, scored_model_type):
    """The probes are the same, so only rounding differs: bf16 has 8 bits of mantissa, fp16 has 11."""
    full, low = (scores_in(p, scored_model_type, method) for p in (None, precision))
    assert spearmanr(full, low).statistic > 0.98
    assert (full - low).norm() < error * full.norm()


def test_sums_are_not_rounded_to_low_precision():
    """A sum kept in bf16 has three digits after a few terms: 100 batches must give the mean of their own results."""
    model = make_model(dtype=torch.float32, num_hidden_layers=1)
    single = [
        scores(estimate_sensitivity(model, [batch], method="gauss_newton_trace", precision="bf16", progress=False))
        for batch in BATCHES
    ]
    often = scores(
        estimate_sensitivity(model, BATCHES * 25, method="gauss_newton_trace", precision="bf16", progress=False)
    )
    torch.testing.assert_close(often, torch.stack(single).mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_loss_scale_is_undone_exactly(method, monkeypatch):
    """In full precision, scaling by any power of two changes nothing."""
    results = []
    for scale in (1.0, 2.0**9):
        monkeypatch.setattr(Precision, "__init__", lambda self, *_, scale=scale: fixed(self, scale))
        results.append(scores(estimate_sensitivity(make_model(), BATCHES, method, progress=False)))
    assert torch.equal(*results)


def fixed(precision, scale):
    precision.dtype, precision.device_type, precision.scale = None, "cpu", scale


@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_lowers_the_loss_scale(method, monkeypatch):
    """A loss so steep that 2^16 times it overflows fp16."""
    lowered, lower_scale = [], Precision.lower_scale
    monkeypatch.setattr(Precision, "lower_scale", lambda self: lowered.append(self.scale) or lower_scale(self))

    def steep(model, batch):
        return 300 * model(**batch).loss

    model = make_model(dtype=torch.float32)
    full, low = (
        estimate_sensitivity(model, BATCHES, method, precision=p, loss_fn=steep, progress=False)
        for p in (None, "fp16")
    )
    assert (scores(full) - scores(low)).norm() < 0.02 * scores(full).norm()
    assert lowered


@pytest.mark.parametrize("autocast", [True, False])
def test_fused_attention_of_bfloat16_is_computed_in_float32(autocast):
    generator = torch.Generator().manual_seed(0)
    q, k, v, cotangent = (torch.randn(2, 3, 5, 4, generator=generator).bfloat16() for _ in range(4))
    mask = torch.rand(2, 1, 5, 5, generator=generator) < 0.7
    mask[..., 0] = True
    wide = [tensor.float().requires_grad_() for tensor in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=0.3)
    narrow = [tensor.requires_grad_() for tensor in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), AttentionInFloat32():
        found = F.scaled_dot_product_attention(*narrow, attn_mask=mask, scale=0.3)
    assert torch.equal(found, expected.bfloat16())
    gradients = (
        torch.autograd.grad(y, x, g) for y, x, g in ((found, narrow, cotangent), (expected, wide, cotangent.float()))
    )
    assert all(torch.equal(first, second.bfloat16()) for first, second in zip(*gradients, strict=True))


def test_other_attention_is_left_alone():
    q = torch.randn(1, 1, 3, 2, dtype=torch.float64)
    with AttentionInFloat32():
        found = F.scaled_dot_product_attention(query=q, key=q, value=q)
    assert torch.equal(found, F.scaled_dot_product_attention(q, q, q)) and found.dtype == torch.float64


def test_curvatures_too_small_for_fp16():
    """A mean over many tokens has tiny second derivatives, here 2^-20 times those of the loss."""

    def flat(model, batch):
        return 2**-20 * model(**batch).loss

    model = make_model(dtype=torch.float32)
    full = estimate_sensitivity(model, BATCHES, progress=False)
    low = estimate_sensitivity(model, BATCHES, precision="fp16", loss_fn=flat, progress=False)
    assert (scores(full) - 2**20 * scores(low)).norm() < 0.02 * scores(full).norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_batch_that_is_sure_of_its_class_is_no_error(precision):
    """Its curvature is rounding noise in low precision, which adds nothing and raises nothing."""
    model = make_model(dtype=torch.float32)
    model.classifier.bias.data = torch.tensor([0.0, 11.0])
    low = estimate_sensitivity(model, BATCHES, precision=precision, progress=False)
    unsure = estimate_sensitivity(make_model(dtype=torch.float32), BATCHES, progress=False)
    assert scores(low).abs().max() < 0.05 * scores(unsure).max()


def test_what_no_scale_can_mend_is_an_error():
    model = make_model(dtype=torch.float32)
    model.bert.encoder.layer[0].output.dense.register_full_backward_hook(lambda m, i, o: (i[0] * float("inf"),))
    with pytest.raises(ValueError, match="Derivatives of batch 0 are not finite"):
        estimate_sensitivity(model, BATCHES, "gradient", precision="fp16", progress=False)


def test_a_model_prepared_for_mixed_precision():
    """The wrapper copies logits and loss separately. Scoring removes it and puts it back."""
    model = make_model(dtype=torch.float32)
    expected = estimate_sensitivity(model, BATCHES, precision="bf16", progress=False)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    forward = prepared.forward
    result = estimate_sensitivity(prepared, BATCHES, accelerator=accelerator, progress=False)
    torch.testing.assert_close(result.heads, expected.heads, rtol=0, atol=0)
    assert prepared.forward is forward


def test_autocast_leaves_models_in_float64():
    expected, found = (
        estimate_sensitivity(make_model(dtype=torch.float64), BATCHES, precision=precision, progress=False)
        for precision in (None, "bf16")
    )
    torch.testing.assert_close(scores(found), scores(expected), rtol=1e-6, atol=0)
