"""What training needs to go on: a whole checkpoint, of the same structure, and the same order of batches."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import PretrainedConfig, PreTrainedModel
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..components.groups import KINDS
from ..components.structure import recorded_numbers, recorded_structure


# Where checkpoints of pruned models go, within the output folder. What starts so is not pushed to the Hub.
RECOVERY = "_recovery"


def last_whole_checkpoint(folder: str | Path, model: PreTrainedModel | None = None) -> str | None:
    """The newest checkpoint in a folder that was written to the end, or `None`.

    `Trainer` writes the training state last, so what was killed while saving has none, or one cut short.

    Args:
        folder (`str` or `Path`): Where checkpoints lie.
        model (`PreTrainedModel`, *optional*): The model to train; checkpoints of another structure are passed over.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(pattern.fullmatch(path.name), path) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for _, path in sorted(((int(match[1]), path) for match, path in found if match), reverse=True):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
            if model is not None:
                validate_same_structure(path, model)
        except (OSError, ValueError, TypeError):
            continue
        return str(path)
    return None


def seeded_by_epoch(sampler: Sampler | None, seed: int) -> Sampler | None:
    """A sampler whose order a resumed training finds again; other samplers than `LengthGroupedSampler` are that."""
    return _SeededByEpoch(sampler, seed) if isinstance(sampler, LengthGroupedSampler) else sampler


class _SeededByEpoch(Sampler[int]):
    """A `LengthGroupedSampler` whose order depends on the seed and the epoch alone.

    Transformers draws it from the global random state as it is when an epoch starts, which a training that is resumed
    amid the epoch does not know any more.

    Args:
        sampler (`LengthGroupedSampler`): The sampler.
        seed (`int`): The seed.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler, self.seed = sampler, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, by accelerate and `Trainer`."""
        self.sampler.generator = torch.Generator().manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def validate_same_structure(checkpoint: str | Path, model: PreTrainedModel) -> None:
    """Checks that a checkpoint is of a model pruned as this one is. Adapters' checkpoints have no say.

    Raises:
        ValueError: If it is not.
    """
    file = Path(checkpoint) / "config.json"
    if not file.is_file():
        return
    structures = [_structure(config) for config in (PretrainedConfig.from_json_file(file), model.config)]
    if structures[0] != structures[1]:
        there, here = ("pruned" if any(structure.values()) else "dense" for structure in structures)
        raise ValueError(
            f"The checkpoint '{checkpoint}' is of a {there} model, the {type(model).__name__} in training is {here}"
            f"{', with another structure' * (there == here)}. Checkpoints of the dense model lie in the output folder, "
            f"those of its recovery in '{RECOVERY}' within it: resume from the one that fits, or prune by its plan first."
        )


def _structure(config: PretrainedConfig) -> dict[str, Any]:
    """What was pruned, without empty entries: numbers that are gone, else counts, and ranks of implants."""
    recorded = recorded_structure(config) or {}
    found: dict[str, Any] = {"implants": recorded.get("implants") or {}}
    for kind in KINDS.values():
        gone = {layer: sorted(numbers) for layer, numbers in recorded_numbers(config, kind).items() if numbers}
        found[kind.name] = gone if kind.keeps_numbers else recorded.get(kind.name) or {}
    return found
