"""Running moments of per-head samples, and how far the ranking they give can be trusted."""

import math

import torch
from scipy.stats import spearmanr


class SampleMoments:
    """Mean, standard error and split-half reliability of noisy per-component samples, in constant memory.

    A sample is what one probe says on one batch. Samples of a batch share its examples, so the standard error
    compares batches where there are several (probe noise and the choice of examples both show up between batches)
    and probes where there is one.

    Args:
        num_components (`int`): Length of a sample.
    """

    def __init__(self, num_components: int):
        self.weight = 0.0
        self.mean = torch.zeros(num_components, dtype=torch.float64)
        self._batches = 0
        self._weight_squares = 0.0
        self._between = torch.zeros_like(self.mean)
        self._within = torch.zeros_like(self.mean)
        self._halves = torch.zeros(2, num_components, dtype=torch.float64)
        self._half_weights = [0.0, 0.0]
        self._samples = 0

    def add_batch(self, samples: torch.Tensor, weight: float) -> None:
        """Adds the samples of one batch.

        Args:
            samples (`torch.Tensor`): Shape `(num_probes, num_components)`.
            weight (`float`): Number of examples in the batch.
        """
        samples = samples.double().cpu()
        for sample in samples:
            half = self._samples % 2
            self._samples += 1
            self._halves[half] += weight * sample
            self._half_weights[half] += weight
        batch_mean = samples.mean(0)
        if len(samples) > 1:
            self._within += weight**2 * samples.var(0) / len(samples)
        # West's weighted form of Welford's update.
        self.weight += weight
        delta = batch_mean - self.mean
        self.mean += delta * (weight / self.weight)
        self._between += weight * delta * (batch_mean - self.mean)
        self._weight_squares += weight**2
        self._batches += 1

    def standard_error(self) -> torch.Tensor | None:
        """Standard error of `mean`, or `None` after a single sample."""
        if self._samples < 2:
            return None
        if self._batches == 1:
            return (self._within / self.weight**2).sqrt()
        effective_batches = self.weight**2 / self._weight_squares
        variance = self._between / self.weight * effective_batches / (effective_batches - 1)
        return (variance / effective_batches).sqrt()

    def reliability(self, scale: torch.Tensor) -> float | None:
        """Split-half Spearman correlation r of `scale * mean`, Spearman-Brown corrected to 2 r / (1 + |r|).

        Samples go to the halves in turn.

        Args:
            scale (`torch.Tensor`): What turns a component's mean into its score, shape `(num_components,)`.

        Returns:
            `float`: The reliability, or `None` after a single sample or where ranks are undefined.
        """
        if min(self._half_weights) == 0 or len(self.mean) < 2:
            return None
        first, second = (scale * half / weight for half, weight in zip(self._halves, self._half_weights, strict=True))
        correlation = float(spearmanr(first, second).statistic)
        return None if math.isnan(correlation) else 2 * correlation / (1 + abs(correlation))
