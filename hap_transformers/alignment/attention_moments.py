"""Sums what bases are computed from: moments of contexts, queries and keys, and curvature of output projections."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..components.groups import Group
from ..components.projections import Projection
from ..sensitivity.backward_pass import BackwardPass
from ..sensitivity.batches import ScoredBatch
from ..sensitivity.task import Samples, ScoringTask
from ..tokens import mask_of, products, valid_tokens
from .bases import RIDGE


@dataclass(frozen=True)
class Features:
    """What one projection reads or gives, head by head.

    Args:
        projection (`Projection`): The projection.
        left (`tuple[int, ...]`): Dimensions of every head.
        shared (`int`): Heads that have the same basis, which are features side by side.
        decoded (`bool`): Whether its tokens are those of a decoder.
        of_stream (`bool`): Whether they are those of the residual stream that attention reads and writes.
    """

    projection: Projection
    left: tuple[int, ...]
    shared: int
    decoded: bool
    of_stream: bool

    def __len__(self) -> int:
        """Number of features."""
        return self.shared * sum(self.left)

    def of_heads(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Splits the last dimension: for every head a tensor of shape `(..., dims, shared)`."""
        pieces = tensor.split([self.shared * count for count in self.left], -1)
        return [piece.unflatten(-1, (count, self.shared)) for piece, count in zip(pieces, self.left, strict=True)]

    @property
    def num_sums(self) -> int:
        """Length of what [`sums`] gives."""
        return len(self) + sum(count**2 for count in self.left)

    def sums(self, tokens: torch.Tensor) -> torch.Tensor:
        """Sums over tokens, of shape `(tokens, features)`: of features, and of their products within heads."""
        of_heads = (head.movedim(-1, 1).flatten(0, 1) for head in self.of_heads(tokens))
        return torch.cat([tokens.sum(0), *(products(head).flatten() for head in of_heads)])

    def moments(self, sums: torch.Tensor, tokens: torch.Tensor, centred: bool) -> list[torch.Tensor]:
        """Every head's second moment, shape `(dims, dims)`, from the sums over so many tokens.

        Where features are constant, a tiny share of their squares is left of centred moments, and not only rounding.
        """
        total, *blocks = sums.split([len(self), *(count**2 for count in self.left)])
        means = [head / tokens for head in self.of_heads(total)]
        found = [block.view(count, count) / tokens for block, count in zip(blocks, self.left, strict=True)]
        if not centred:
            return found
        least = [RIDGE**2 * block.diagonal().mean() * torch.eye(len(block)).to(block) for block in found]
        return [block - mean @ mean.T + own for block, mean, own in zip(found, means, least, strict=True)]


@dataclass(frozen=True)
class Attention:
    """One layer's attention, whose heads' bases may change.

    Args:
        values (`Group`): Its value dimensions.
        query_keys (`Group`, *optional*): Its query/key dimensions, if their basis may change, too.
    """

    values: Group
    query_keys: Group | None

    @property
    def contexts(self) -> Features:
        """What the output projection reads."""
        return _features(self.values, self.values.reader, self.values.reader.in_features)

    @property
    def queries_and_keys(self) -> list[Features]:
        """What the query and key projections give."""
        group = self.query_keys
        return [] if group is None else [_features(group, writer, writer.out_features) for writer in group.writers]

    def lengths(self) -> list[int]:
        """Lengths of the sums: tokens, contexts, the output projection's curvature; tokens, queries; tokens, keys."""
        curvature = self.values.reader.out_features**2
        others = [length for features in self.queries_and_keys for length in (1, features.num_sums)]
        return [1, self.contexts.num_sums, curvature, *others]


def _features(group: Group, projection: Projection, width: int) -> Features:
    assert group.runs is not None
    whole = group.runs.whole
    # In cross-attention, keys are of what the encoder gives.
    of_memory = whole.decoded and whole.of_stream is not None and projection.module is whole.writers[1].module
    of_stream = not of_memory
    left = tuple(group.runs.left)
    return Features(projection, left, width // group.num_components, whole.decoded and of_stream, of_stream)


def attention_moments(layers: Sequence[Attention], task: ScoringTask, batch: ScoredBatch) -> Samples:
    """Sums all moments over a batch, in the order of [`Attention.lengths`]."""
    found = _MomentPass(layers, task, batch)
    directions = found.run()
    scale = max(directions.num_probes, 1) * task.precision.scale**2
    # There are no values. Those that are not finite ask for a lower loss scale, as where values overflow.
    value = 0.0 if all(curvature.isfinite().all() for curvature in found.curvatures.values()) else math.nan
    values = torch.full((batch.size, sum(task.counts)), value, device=task.device)
    return Samples(values, directions.num_probes, found.sums(scale))


class _MomentPass(BackwardPass):
    """Adds up the curvature of every output projection, and keeps what the sums are of."""

    def __init__(self, layers: Sequence[Attention], task: ScoringTask, batch: ScoredBatch):
        self.layers = layers
        self.dtype = torch.promote_types(task.model.dtype, torch.float32)
        readers = [layer.values.reader for layer in layers]
        self.curvatures: dict[nn.Module, torch.Tensor] = {
            reader.module: torch.zeros(2 * (reader.out_features,), dtype=self.dtype, device=task.device)
            for reader in readers
        }
        given = [features.projection for layer in layers for features in layer.queries_and_keys]
        super().__init__(task, batch, readers, given)

    def receive(self, module: nn.Module, tokens: torch.Tensor, cotangents: torch.Tensor) -> None:
        self.curvatures[module] += products(cotangents.flatten(0, -2).to(self.dtype))

    def sums(self, scale: float) -> Iterator[torch.Tensor]:
        """Yields all sums; curvatures are divided by the scale."""
        for layer in self.layers:
            reader = layer.values.reader
            calls = self.inputs.pop(reader.module)
            contexts = self._valid(layer.contexts, [reader.read(call) for call in calls])
            yield contexts.new_tensor(len(contexts))
            yield layer.contexts.sums(contexts)
            yield self.curvatures[reader.module] / scale
            for features in layer.queries_and_keys:
                # DeBERTa also projects relative positions, which are no tokens.
                given = [
                    features.projection.given(call)
                    for call in self.outputs[features.projection.module]
                    if not features.of_stream or call.shape[:-1] == calls[0].shape[:-1]
                ]
                tokens = self._valid(features, given)
                yield tokens.new_tensor(len(tokens))
                yield features.sums(tokens)

    def _valid(self, features: Features, calls: Sequence[torch.Tensor]) -> torch.Tensor:
        mask = mask_of(self.batch.inputs, features.decoded)
        return torch.cat([valid_tokens(call, mask) for call in calls]).to(self.dtype)
