"""Running moments of per-component samples, and the reliability of the ranking by their means."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch


@dataclass
class SampleMoments:
    """Mean, standard error and split-half reliability of noisy per-component samples, in constant memory.

    A group is a set of examples that are sampled independently of all others. It is a single example if the method
    samples each example separately. It is a batch if a probe samples all examples of a batch at once.

    With several groups, the standard error and the halves compare groups; differences between groups reflect both the
    choice of examples and the probe noise. With a single group, they compare its probes.

    All fields are float64 tensors, and stay on the device where they were made.

    Args:
        totals (`torch.Tensor`): Number of examples, sum of the groups' squared numbers of examples, number of groups,
            number of samples; shape `(4,)`.
        mean (`torch.Tensor`): Mean over examples, shape `(components,)`.
        between (`torch.Tensor`): Squared deviations of the groups' means from `mean`, weighted by examples and summed,
            shape `(components,)`.
        within (`torch.Tensor`): Variance of the sum over all examples that is due to the probes, shape
            `(components,)`.
        halves (`torch.Tensor`): Sums over either half of the groups (index 0) and of the probes (index 1), shape
            `(2, 2, components)`.
        half_weights (`torch.Tensor`): Numbers of examples in these sums, shape `(2, 2)`.
        sums (`torch.Tensor`): Other sums over examples that the method needs (`Samples.sums`), shape `(num_sums,)`.
    """

    totals: torch.Tensor
    mean: torch.Tensor
    between: torch.Tensor
    within: torch.Tensor
    halves: torch.Tensor
    half_weights: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def zeros(
        cls, num_components: int, num_sums: int = 0, device: torch.device | str | None = None
    ) -> "SampleMoments":
        """Returns the moments of no samples."""
        shapes = [(4,), (num_components,), (num_components,), (num_components,), (2, 2, num_components), (2, 2)]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in (*shapes, (num_sums,))))

    @classmethod
    def joined(cls, parts: Sequence["SampleMoments"], order: torch.Tensor) -> "SampleMoments":
        """Returns the moments of all components whose parts were sampled apart, on the same examples; without sums.

        Args:
            parts (`Sequence[SampleMoments]`): The parts.
            order (`torch.Tensor`): Positions of the components among those of all parts.
        """
        whole = {
            name: torch.cat([getattr(part, name) for part in parts], -1)[..., order]
            for name in ("mean", "between", "within", "halves")
        }
        first = parts[0]
        return cls(totals=first.totals, half_weights=first.half_weights, sums=first.sums[:0], **whole)

    @property
    def num_examples(self) -> int:
        """Number of examples so far."""
        return int(self.totals[0])

    def add_examples(self, values: torch.Tensor, first: int) -> None:
        """Adds one sample per example.

        Args:
            values (`torch.Tensor`): Shape `(examples, components)`.
            first (`int`): Position of the first example among all examples. Examples alternate between the halves.
        """
        values = values.detach().to(self.mean)
        count = len(values)
        mean = values.mean(0)
        for half in range(2):
            members = values[(first + half) % 2 :: 2]
            self.halves[0, half] += members.sum(0)
            self.half_weights[0, half] += len(members)
        self._merge(self.totals.new_tensor([count] * 4), mean, ((values - mean) ** 2).sum(0))

    def add_probes(self, values: torch.Tensor, size: int, number: int) -> None:
        """Adds one sample per probe; each probe covers all examples of one batch.

        Args:
            values (`torch.Tensor`): Shape `(probes, components)`.
            size (`int`): Number of examples in the batch.
            number (`int`): Position of the batch. Batches alternate between the halves, as do each batch's probes.
        """
        values = values.detach().to(self.mean)
        mean, count = values.mean(0), len(values)
        self.halves[0, number % 2] += size * mean
        self.half_weights[0, number % 2] += size
        for half in range(2):
            self.halves[1, half] += size * values[half::2].sum(0)
            self.half_weights[1, half] += size * len(values[half::2])
        if count > 1:
            self.within += size**2 * values.var(0) / count
        self._merge(self.totals.new_tensor([size, size**2, 1, count]), mean, torch.zeros_like(mean))

    def add(self, other: "SampleMoments") -> None:
        """Adds the samples behind other moments."""
        if not other.num_examples:
            return
        for name in ("within", "halves", "half_weights", "sums"):
            getattr(self, name).add_(getattr(other, name))
        self._merge(other.totals, other.mean, other.between)

    def add_sums(self, parts: Iterable[torch.Tensor]) -> None:
        """Adds to `sums`, in place, the tensors that follow each other there."""
        start = 0
        for part in parts:
            self.sums[start : start + part.numel()] += part.detach().flatten().to(self.sums.device)
            start += part.numel()

    def pack(self) -> torch.Tensor:
        """Concatenates all fields in one vector, to send it to other processes."""
        return torch.cat([getattr(self, field.name).flatten() for field in fields(self)])

    def unpacked(self, vector: torch.Tensor) -> "SampleMoments":
        """Restores moments from the vector that `pack` made; their shapes are those of `self`."""
        parts = vector.to(self.mean).split([getattr(self, field.name).numel() for field in fields(self)])
        shapes = [getattr(self, field.name).shape for field in fields(self)]
        return SampleMoments(*(part.reshape(shape).clone() for part, shape in zip(parts, shapes, strict=True)))

    def _merge(self, totals: torch.Tensor, mean: torch.Tensor, between: torch.Tensor) -> None:
        # Welford's update in its weighted form for groups of samples (West 1979; Chan et al. 1979).
        before, added = self.totals[0].clone(), totals[0]
        self.totals += totals
        delta = mean - self.mean
        self.mean += delta * (added / self.totals[0])
        self.between += between + delta**2 * (before * added / self.totals[0])

    def standard_error(self) -> torch.Tensor | None:
        """Computes the standard error of `mean`; `None` after fewer than two samples."""
        examples, squares, groups, samples = self.totals
        if samples < 2:
            return None
        if groups == 1:
            return (self.within / squares).sqrt()
        effective_groups = examples**2 / squares
        return (self.between / examples / (effective_groups - 1)).sqrt()

    def reliability(self, scores: Callable[[torch.Tensor], torch.Tensor]) -> float | None:
        """Computes the split-half reliability of the scores.

        It is the Spearman correlation r of the scores of both halves, corrected by Spearman-Brown to 2 r / (1 + |r|).

        Args:
            scores (`Callable`): Turns a mean, shape `(components,)`, into the scores to rank.

        Returns:
            `float`: The reliability, or `None` if a half is empty or the ranks are undefined.
        """
        from scipy.stats import spearmanr  # Imported here, because it takes half a second.

        kind = 0 if self.totals[2] > 1 else 1
        weights = self.half_weights[kind]
        if weights.min() == 0:
            return None
        first, second = (scores((half / w).cpu()) for half, w in zip(self.halves[kind], weights, strict=True))
        if len(first) < 2 or any(bool((half == half[0]).all()) for half in (first, second)):
            return None
        correlation = float(spearmanr(first, second).statistic)
        return None if math.isnan(correlation) else 2 * correlation / (1 + abs(correlation))
