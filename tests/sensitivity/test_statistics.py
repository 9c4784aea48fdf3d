import pytest
import torch
from conftest import make_batch, make_model
from transformers.utils import logging

from hap_transformers import estimate_sensitivity
from hap_transformers.sensitivity.statistics import SampleMoments


def test_standard_error_over_repeated_runs():
    """Batches with effects of their own, probes with noise: the reported error must be the true spread of the mean."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([4.0, 4.0, 2.0] * 5)
    means, errors = [], []
    for _ in range(400):
        moments = SampleMoments(3)
        for size in sizes:
            effect = torch.randn(1, 3, generator=generator) / size.sqrt()
            noise = torch.randn(4, 3, generator=generator) / size.sqrt()
            moments.add_batch(effect + noise, float(size))
        means.append(moments.mean.clone())
        errors.append(moments.standard_error())
    true = torch.stack(means).std(0)
    reported = torch.stack(errors).square().mean(0).sqrt()
    torch.testing.assert_close(reported, true, rtol=0.2, atol=0)


def test_one_batch_uses_its_probes():
    moments = SampleMoments(1)
    samples = torch.tensor([[1.0], [2.0], [6.0]])
    moments.add_batch(samples, 8)
    assert moments.standard_error().item() == pytest.approx((7 / 3) ** 0.5)  # Sample variance 7 of three samples.


def test_one_sample_has_neither_error_nor_reliability():
    moments = SampleMoments(2)
    moments.add_batch(torch.ones(1, 2), 8)
    assert moments.standard_error() is None and moments.reliability(torch.ones(2)) is None


def test_reliability_of_signal_and_noise():
    generator = torch.Generator().manual_seed(0)
    signal, noise = SampleMoments(200), SampleMoments(200)
    truth = torch.randn(200, generator=generator)
    for _ in range(8):
        signal.add_batch((truth + 0.1 * torch.randn(200, generator=generator))[None], 4)
        noise.add_batch(torch.randn(1, 200, generator=generator), 4)
    assert signal.reliability(torch.ones(200)) > 0.98
    assert abs(noise.reliability(torch.ones(200))) < 0.25


def test_an_unresolved_ranking_is_announced(monkeypatch):
    warnings = []
    monkeypatch.setattr(
        logging.get_logger("hap_transformers.sensitivity.estimate"), "warning", lambda text: warnings.append(text)
    )
    batches = [make_batch(seed=seed) for seed in range(4)]
    result = estimate_sensitivity(make_model(), batches, num_probes=1, progress=False)
    assert (result.reliability < 0.5) == bool(warnings)
    monkeypatch.setattr("hap_transformers.sensitivity.estimate.RELIABLE", 2.0)
    estimate_sensitivity(make_model(), batches, num_probes=1, progress=False)
    assert "not resolved" in warnings[-1]
