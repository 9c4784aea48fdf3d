"""Resumes training: finds a complete checkpoint of the same structure, and repeats the order of batches."""

import json
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

from ..alignment.basis_name import take_bases
from ..components.groups import KINDS
from ..components.plain_config import saved_config
from ..components.structure import recorded_numbers, recorded_structure


# Folder for checkpoints of pruned models, inside the output folder. `Trainer` does not push names with a leading "_".
RECOVERY = "_recovery"


def last_whole_checkpoint(folder: str | Path, model: PreTrainedModel | None = None) -> str | None:
    """Finds the newest completely written checkpoint in a folder.

    `Trainer` writes the training state last. If the process is killed while it saves, the state is missing or cut off.

    Args:
        folder (`str` or `Path`): The folder with the checkpoints.
        model (`PreTrainedModel`, *optional*): The model to train. Checkpoints of another structure are skipped.

    Returns:
        `str`: Path of the checkpoint, or `None` if there is none.
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
    """Makes the order of a `LengthGroupedSampler` repeatable after a resumption; returns other samplers unchanged."""
    return _SeededByEpoch(sampler, seed) if isinstance(sampler, LengthGroupedSampler) else sampler


class _SeededByEpoch(Sampler[int]):
    """A `LengthGroupedSampler` whose order depends only on the seed and the epoch.

    Transformers draws the order from the global random state at the start of an epoch. A training that is resumed
    within an epoch no longer has that state.

    Args:
        sampler (`LengthGroupedSampler`): The sampler.
        seed (`int`): The seed.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler, self.seed = sampler, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Seeds the epoch's order; accelerate and `Trainer` call this before each epoch."""
        self.sampler.generator = torch.Generator().manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def validate_same_structure(checkpoint: str | Path, model: PreTrainedModel) -> None:
    """Checks that a checkpoint's model was pruned in the same way as this model.

    A checkpoint without a config, such as an adapter's, passes.

    Raises:
        ValueError: If the structures differ.
    """
    file = Path(checkpoint) / "config.json"
    if not file.is_file():
        return
    structures = [_structure(config) for config in (PretrainedConfig.from_json_file(file), saved_config(model))]
    if structures[0] != structures[1]:
        saved, current = ("pruned" if any(structure.values()) else "dense" for structure in structures)
        raise ValueError(
            f"The checkpoint '{checkpoint}' is of a {saved} model, the {type(model).__name__} in training is {current}"
            f"{', with another structure' * (saved == current)}. Checkpoints of the dense model are in the output "
            f"folder, those of its recovery in the folder '{RECOVERY}' inside it. Resume from a checkpoint that fits "
            "the model, or first prune the model by the checkpoint's plan."
        )
    _validate_same_sizes(checkpoint, json.loads(file.read_text(encoding="utf-8")), saved_config(model).to_dict())


def _validate_same_sizes(checkpoint: str | Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Checks that plain numbers of layers are those of a checkpoint, which uniform plans change.

    Raises:
        ValueError: If they differ.
    """
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in names:
        if name in saved and saved[name] != current.get(name, saved[name]):
            raise ValueError(
                f"The checkpoint '{checkpoint}' has {name}={saved[name]}, and the model in training has "
                f"{current[name]}: it was pruned by a uniform plan, or is another one. Resume from a checkpoint that "
                "fits the model, or load the model from this checkpoint."
            )


def take_basis(checkpoint: str | Path, model: PreTrainedModel) -> None:
    """Notes the basis that the heads of a checkpoint, whose weights were loaded into a model, are in."""
    file = Path(checkpoint) / "config.json"
    if file.is_file():
        take_bases(model.config, PretrainedConfig.from_json_file(file))


def _structure(config: PretrainedConfig) -> dict[str, Any]:
    """Returns what was pruned, by kind, without empty entries.

    The values are the numbers of the removed components if the kind keeps numbers, otherwise the counts of components
    left. The entry "implants" has the ranks of implants.
    """
    recorded = recorded_structure(config) or {}
    found: dict[str, Any] = {"implants": recorded.get("implants") or {}}
    for kind in KINDS.values():
        gone = {layer: sorted(numbers) for layer, numbers in recorded_numbers(config, kind).items() if numbers}
        found[kind.name] = gone if kind.keeps_numbers else recorded.get(kind.name) or {}
    return found
