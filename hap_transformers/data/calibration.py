"""Draws the training examples that scoring and refit use."""

import random
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, cast

import numpy as np
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
    generator = torch.Generator().manual_seed(seed)  # Loaders draw a seed for their workers.
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn, generator=generator)


def drawn_alike(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """Goes through batches whose making draws random numbers, such as masked tokens: the same in every pass.

    The global random states of Python, NumPy and torch's processor are neither read nor changed.

    Args:
        batches (`Iterable[Any]`): The batches.
        seed (`int`): Seed of what is drawn.
    """
    around, iterator = _random_states(), None
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    while True:
        try:
            iterator = iter(batches) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            inside = _random_states()
            _set_random_states(around)
        yield batch
        around = _random_states()
        _set_random_states(inside)


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])
