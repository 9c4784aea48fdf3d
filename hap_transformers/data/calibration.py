"""The training examples that are scored and refitted on."""

from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset


def calibration_batches(
    dataset: Dataset | IterableDataset, max_examples: int, seed: int, batch_size: int, collate_fn: Callable[..., Any]
) -> DataLoader:
    """Batches of examples that are drawn by a seed; of a data set without a length, its first ones.

    Args:
        dataset (`Dataset` or `IterableDataset`): The examples to draw from.
        max_examples (`int`): How many to draw. A data set without a length is not cut.
        seed (`int`): Seed of the draw; the global random state is neither read nor moved.
        batch_size (`int`): Examples a batch.
        collate_fn (`Callable`): Makes a batch of a list of examples.
    """
    if not isinstance(dataset, IterableDataset):
        order = torch.randperm(len(cast(Sized, dataset)), generator=torch.Generator().manual_seed(seed))
        dataset = Subset(dataset, order[:max_examples].tolist())
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn)
