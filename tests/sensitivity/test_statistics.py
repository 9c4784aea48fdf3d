import pytest
import torch
from tiny import make_batch, make_model
from transformers.utils import logging

from hap_transformers import estimate_sensitivity
from hap_transformers.sensitivity.statistics import SampleMoments


def test_standard_error_over_repeated_runs():
    """Batches differ and probes are noisy: the reported error is the true spread of the mean."""
    generator = torch.Generator().manual_seed(0)
    sizes = [4, 4, 2] * 5
    means, errors = [], []
    for _ in range(400):
        moments = SampleMoments.zeros(3)
        for number, size in enumerate(sizes):
            effect = torch.randn(1, 3, generator=generator) / size**0.5
            noise = torch.randn(4, 3, generator=generator) / size**0.5
            moments.add_probes(effect + noise, size, number)
        means.append(moments.mean.clone())
        errors.append(moments.standard_error())
    true = torch.stack(means).std(0)
    reported = torch.stack(errors).square().mean(0).sqrt()
    torch.testing.assert_close(reported, true, rtol=0.2, atol=0)


def test_examples_give_the_textbook_mean_and_error():
    values = torch.randn(11, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    moments = SampleMoments.zeros(2)
    moments.add_examples(values[:7], 0)
    moments.add_examples(values[7:], 7)
    torch.testing.assert_close(moments.mean, values.mean(0), rtol=1e-15, atol=0)
    torch.testing.assert_close(moments.standard_error(), values.std(0) / 11**0.5)
    torch.testing.assert_close(moments.halves[0], torch.stack([values[::2].sum(0), values[1::2].sum(0)]))


def test_moments_can_be_collected_apart():
    """Processes send moments as vectors; those of parts of the batches add up to those of all."""
    generator = torch.Generator().manual_seed(0)
    together, parts = SampleMoments.zeros(5, 2), [SampleMoments.zeros(5, 2) for _ in range(3)]
    for number in range(8):
        samples = torch.randn(4, 5, generator=generator)
        for moments in (together, parts[number % 3]):
            moments.add_probes(samples, 3 + number, number)
            moments.sums += number
    merged = SampleMoments.zeros(5, 2)
    for part in parts:
        merged.add(merged.unpacked(part.pack()))
    torch.testing.assert_close(merged.pack(), together.pack())
    torch.testing.assert_close(merged.standard_error(), together.standard_error())


def test_one_batch_uses_its_probes():
    moments = SampleMoments.zeros(1)
    moments.add_probes(torch.tensor([[1.0], [2.0], [6.0]]), 8, 0)
    assert moments.standard_error().item() == pytest.approx((7 / 3) ** 0.5)  # Sample variance 7 of three samples.


def test_one_sample_has_neither_error_nor_reliability():
    for add in (lambda m: m.add_probes(torch.ones(1, 2), 8, 0), lambda m: m.add_examples(torch.ones(1, 2), 0)):
        moments = SampleMoments.zeros(2)
        add(moments)
        assert moments.standard_error() is None and moments.reliability(lambda means: means) is None


@pytest.mark.filterwarnings("error")
def test_scores_that_are_all_alike_have_no_reliability():
    moments = SampleMoments.zeros(3)
    for number in range(4):
        moments.add_examples(torch.ones(2, 3), number)
    assert moments.reliability(lambda means: means) is None


def test_reliability_of_signal_and_noise():
    generator = torch.Generator().manual_seed(0)
    signal, noise = SampleMoments.zeros(200), SampleMoments.zeros(200)
    truth = torch.randn(200, generator=generator)
    for number in range(8):
        signal.add_probes((truth + 0.1 * torch.randn(200, generator=generator))[None], 4, number)
        noise.add_probes(torch.randn(1, 200, generator=generator), 4, number)
    assert signal.reliability(lambda means: means) > 0.98
    assert abs(noise.reliability(lambda means: means)) < 0.25


def test_reliability_foresees_another_sample():
    """Batches differ and their probes agree. Halves that shared batches would overestimate the reliability."""
    generator = torch.Generator().manual_seed(0)
    moments = SampleMoments.zeros(300)
    for number in range(2):
        moments.add_probes(torch.randn(1, 300, generator=generator).expand(4, -1), 4, number)
    assert abs(moments.reliability(lambda means: means)) < 0.25


def test_an_unresolved_ranking_is_announced(monkeypatch):
    warnings = []
    monkeypatch.setattr(
        logging.get_logger("hap_transformers.sensitivity.estimate"), "warning", lambda text: warnings.append(text)
    )
    batches = [make_batch(seed=seed) for seed in range(4)]
    result = estimate_sensitivity(make_model(), batches, "hessian_trace", num_probes=1, progress=False)
    assert (result.reliability < 0.5) == bool(warnings)
    monkeypatch.setattr("hap_transformers.sensitivity.estimate.RELIABLE", 2.0)
    estimate_sensitivity(make_model(), batches, "hessian_trace", num_probes=1, progress=False)
    assert "not resolved" in warnings[-1]
