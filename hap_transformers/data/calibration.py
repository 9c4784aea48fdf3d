"""Draws the training examples that scoring and refit use."""

from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset


def calibration_batches(
    dataset: Dataset | IterableDataset, max_examples: int, seed: int, batch_size: int, collate_fn: Callable[..., Any]
) -> DataLoader:
    """Makes batches of randomly drawn examples.

    A data set without a length (`IterableDataset`) is neither shuffled nor cut: its examples come in their order.

    Args:
        dataset (`Dataset` or `IterableDataset`): The examples to draw from.
        max_examples (`int`): How many examples to draw.
        seed (`int`): Seed of the draw. The global random state is neither read nor changed.
        batch_size (`int`): Examples per batch.
        collate_fn (`Callable`): Makes a batch from a list of examples.
    """
    if not isinstance(dataset, IterableDataset):
        order = torch.randperm(len(cast(Sized, dataset)), generator=torch.Generator().manual_seed(seed))
        dataset = Subset(dataset, order[:max_examples].tolist())
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn)
