"""Checkpoints that training can go on from."""

import re
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .structure import recorded_structure


# Where checkpoints of pruned models go, within the output folder. What starts so is not pushed to the Hub.
RECOVERY = "_recovery"


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in a folder that was written to the end, or `None`.

    `Trainer` writes the training state last, so what was killed while saving has none, or one cut short.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(pattern.fullmatch(path.name), path) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for _, path in sorted(((int(match[1]), path) for match, path in found if match), reverse=True):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
        except (OSError, ValueError, TypeError):
            continue
        return path
    return None


def validate_same_structure(checkpoint: str | Path, model: PreTrainedModel) -> None:
    """Checks that a checkpoint is of a model pruned as this one is. Adapters' checkpoints have no say.

    Raises:
        ValueError: If it is not.
    """
    if not (Path(checkpoint) / "config.json").is_file():
        return
    structures = [_structure(config) for config in (AutoConfig.from_pretrained(checkpoint), model.config)]
    if structures[0] != structures[1]:
        there, here = ("pruned" if any(structure) else "dense" for structure in structures)
        raise ValueError(
            f"The checkpoint '{checkpoint}' is of a {there} model, the {type(model).__name__} in training is {here}"
            f"{', otherwise' * (there == here)}. Checkpoints of the dense model lie in the output folder, those "
            f"of its recovery in '{RECOVERY}' within it: resume from the one that fits, or prune by its plan first."
        )


def _structure(config: PretrainedConfig) -> tuple[dict[int, list[int]], dict[str, int], dict[str, int]]:
    recorded = recorded_structure(config) or {}
    heads = {int(layer): sorted(gone) for layer, gone in (getattr(config, "pruned_heads", None) or {}).items()}
    return {k: v for k, v in heads.items() if v}, recorded.get("neurons") or {}, recorded.get("implants") or {}
