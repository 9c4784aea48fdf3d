"""Running moments of per-component samples, and how far the ranking they give can be trusted."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch


@dataclass
class SampleMoments:
    """Mean, standard error and split-half reliability of noisy per-component samples, in constant memory.

    A group is a set of examples that were looked at independently of the others: a single example where a method
    looks at each by itself, a batch where a probe looks at all its examples at once. The standard error compares
    groups where there are several (the choice of examples and probe noise both show up between groups) and the probes
    of the one group otherwise; so do the halves. All fields are float64 tensors on the CPU.

    Args:
        totals (`torch.Tensor`): Number of examples, sum over groups of their squared numbers, groups, samples.
        mean (`torch.Tensor`): Shape `(components,)`, weighted by examples.
        between (`torch.Tensor`): Weighted squared deviations of the groups' means from `mean`.
        within (`torch.Tensor`): The variance that probes give the sum over groups.
        halves (`torch.Tensor`): Shape `(2, 2, components)`: sums of either half, of groups and of probes.
        half_weights (`torch.Tensor`): Shape `(2, 2)`: the examples in them.
        sums (`torch.Tensor`): Whatever else a method sums up over examples, shape `(num_sums,)`.
    """

    totals: torch.Tensor
    mean: torch.Tensor
    between: torch.Tensor
    within: torch.Tensor
    halves: torch.Tensor
    half_weights: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def zeros(cls, num_components: int, num_sums: int = 0) -> "SampleMoments":
        """Moments of nothing yet."""
        shapes = [(4,), (num_components,), (num_components,), (num_components,), (2, 2, num_components), (2, 2)]
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in (*shapes, (num_sums,))))

    @property
    def num_examples(self) -> int:
        """Examples so far."""
        return int(self.totals[0])

    def add_examples(self, values: torch.Tensor, first: int) -> None:
        """Adds samples that each look at one example.

        Args:
            values (`torch.Tensor`): Shape `(examples, components)`.
            first (`int`): Position of the first example among all; examples go to the halves in turn.
        """
        values = values.detach().cpu().double()
        count = len(values)
        mean = values.mean(0)
        for half in range(2):
            members = values[(first + half) % 2 :: 2]
            self.halves[0, half] += members.sum(0)
            self.half_weights[0, half] += len(members)
        self._merge(torch.tensor([count, count, count, count]), mean, ((values - mean) ** 2).sum(0))

    def add_probes(self, values: torch.Tensor, size: int, number: int) -> None:
        """Adds samples that each look at all examples of one batch.

        Args:
            values (`torch.Tensor`): Shape `(probes, components)`.
            size (`int`): Examples in the batch.
            number (`int`): Position of the batch; batches go to the halves in turn, as do its probes.
        """
        values = values.detach().cpu().double()
        mean, count = values.mean(0), len(values)
        self.halves[0, number % 2] += size * mean
        self.half_weights[0, number % 2] += size
        for half in range(2):
            self.halves[1, half] += size * values[half::2].sum(0)
            self.half_weights[1, half] += size * len(values[half::2])
        if count > 1:
            self.within += size**2 * values.var(0) / count
        self._merge(torch.tensor([size, size**2, 1, count]), mean, torch.zeros_like(mean))

    def add(self, other: "SampleMoments") -> None:
        """Adds the samples of other moments."""
        if not other.num_examples:
            return
        for name in ("within", "halves", "half_weights", "sums"):
            getattr(self, name).add_(getattr(other, name))
        self._merge(other.totals, other.mean, other.between)

    def pack(self) -> torch.Tensor:
        """All fields as one vector, for sending."""
        return torch.cat([getattr(self, field.name).flatten() for field in fields(self)])

    def unpacked(self, vector: torch.Tensor) -> "SampleMoments":
        """The moments of the same shapes that `pack` made `vector` of."""
        parts = vector.double().cpu().split([getattr(self, field.name).numel() for field in fields(self)])
        shapes = [getattr(self, field.name).shape for field in fields(self)]
        return SampleMoments(*(part.reshape(shape).clone() for part, shape in zip(parts, shapes, strict=True)))

    def _merge(self, totals: torch.Tensor, mean: torch.Tensor, between: torch.Tensor) -> None:
        # Welford's update, in the weighted form for groups of samples (West 1979; Chan et al. 1979).
        before, added = self.totals[0].clone(), totals[0]
        self.totals += totals
        delta = mean - self.mean
        self.mean += delta * (added / self.totals[0])
        self.between += between + delta**2 * (before * added / self.totals[0])

    def standard_error(self) -> torch.Tensor | None:
        """Standard error of `mean`, or `None` after a single sample."""
        examples, squares, groups, samples = self.totals
        if samples < 2:
            return None
        if groups == 1:
            return (self.within / squares).sqrt()
        effective_groups = examples**2 / squares
        return (self.between / examples / (effective_groups - 1)).sqrt()

    def reliability(self, scores: Callable[[torch.Tensor], torch.Tensor]) -> float | None:
        """Split-half Spearman correlation r of the scores, Spearman-Brown corrected to 2 r / (1 + |r|).

        Args:
            scores (`Callable`): Turns a mean, shape `(components,)`, into the scores whose ranking is meant.

        Returns:
            `float`: The reliability, or `None` where there are not two halves or ranks are undefined.
        """
        from scipy.stats import spearmanr  # Here: it takes half a second, which importing the package should not.

        kind = 0 if self.totals[2] > 1 else 1
        weights = self.half_weights[kind]
        if weights.min() == 0:
            return None
        first, second = (scores(half / weight) for half, weight in zip(self.halves[kind], weights, strict=True))
        if len(first) < 2:
            return None
        correlation = float(spearmanr(first, second).statistic)
        return None if math.isnan(correlation) else 2 * correlation / (1 + abs(correlation))
