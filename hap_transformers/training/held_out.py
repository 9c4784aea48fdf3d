"""Sets training examples aside, on which a recovery is watched."""

from collections.abc import Callable, Mapping, Sized
from typing import Any

import torch
from torch.utils.data import IterableDataset, Subset

from .config import HapConfig


# Share of the examples that are set aside, and how many they are at most.
SHARE, MOST = 0.05, 512


def split(trainer: Any, config: HapConfig) -> tuple[Any, Any]:
    """Splits a trainer's training set into what refit and recovery see, and what the recovery is watched on.

    Args:
        trainer (`HapTrainerMixin`): The trainer.
        config (`HapConfig`): Its configuration.

    Returns:
        `tuple[Any, Any]`: Both parts. The second one is `None` if no examples are set aside.
    """
    # Loaders and samplers of a trainer's own may count on the whole data set.
    own = makes_batches(trainer) or _has_own(trainer, trainer._get_train_sampler)
    if config.recovery_check != "held_out" or own:
        return trainer.train_dataset, None
    return set_aside(trainer.train_dataset, trainer.args.seed)


def makes_batches(trainer: Any) -> bool:
    """Whether a trainer has methods of its own that make its loaders of training batches."""
    return _has_own(trainer, trainer.get_train_dataloader, trainer._get_dataloader)


def _has_own(trainer: Any, *methods: Callable[..., Any]) -> bool:
    known = {"transformers", "hap_transformers", trainer.hooks.package}
    return any(getattr(method, "__module__", "").partition(".")[0] not in known for method in methods)


def set_aside(dataset: Any, seed: int) -> tuple[Any, Any]:
    """Splits examples into those to train on and those to watch the training on: a twentieth, at most 512.

    Args:
        dataset (`Dataset`, `torch.utils.data.Dataset` or a mapping of such): The examples; of a mapping, every data
            set is split.
        seed (`int`): Seed of the draw.

    Returns:
        `tuple[Any, Any]`: Both parts, in the form of the data set. The second one is `None` if there are fewer than 20
        examples, or their number is unknown; then the first one is the whole data set.
    """
    if isinstance(dataset, Mapping):
        parts = {name: set_aside(part, seed) for name, part in dataset.items()}
        if any(held_out is None for _, held_out in parts.values()):
            return dataset, None
        rest, held_out = ({name: part[side] for name, part in parts.items()} for side in (0, 1))
        return type(dataset)(rest), type(dataset)(held_out)  # type: ignore[call-arg]
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        return dataset, None
    total = len(dataset)
    count = min(int(SHARE * total), MOST)
    if not count:
        return dataset, None
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return _picked(dataset, sorted(order[count:])), _picked(dataset, sorted(order[:count]))


def _picked(dataset: Any, places: list[int]) -> Any:
    # The package is not imported for it: where it is missing, no data set is its own.
    of_datasets = type(dataset).__module__.partition(".")[0] == "datasets"
    return dataset.select(places) if of_datasets else Subset(dataset, places)
