"""What a run has finished, kept on disk, so that the same command goes on after it was killed."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hap_transformers import HapTrainer, Sensitivity
from hap_transformers.files import write_text
from hap_transformers.training.resuming import RECOVERY, last_whole_checkpoint


class Stages:
    """The fine-tuned model and its scores, in a folder of the output folder that is removed at the end of the run.

    What comes after them, pruning and the refit, takes less time than they do and gives the same each time. Training
    goes on from `Trainer`'s checkpoints where `--save_strategy` asks for any, or else starts again.

    Args:
        output (`Path`): The run's output folder.
        command (`Sequence[str]`): The run's flags; what another command has left is not taken up.

    Raises:
        ValueError: If the output folder has checkpoints of another run, which this one would mistake for its own.
    """

    def __init__(self, output: Path, command: Sequence[str]):
        self.output, self.folder = output, output / "_unfinished_run"
        self.dense, self._scores = self.folder / "dense", self.folder / "sensitivity.safetensors"
        written = self.folder / "command.json"
        if written.exists() and json.loads(written.read_text(encoding="utf-8")) == list(command):
            return
        for folder in (output, output / RECOVERY):
            if list(folder.glob("checkpoint-*")):
                raise ValueError(
                    f"'{folder}' has checkpoints of another run. Choose another --output_dir, or delete them."
                )
        written.unlink(missing_ok=True)  # First: without it what is left is nobody's.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_text(written, json.dumps(list(command)))

    def checkpoint(self, folder: str = "") -> str | None:
        """The last whole checkpoint in a folder of the output folder, if there is any."""
        return last_whole_checkpoint(self.output / folder)

    def save_dense(self, trainer: HapTrainer, **figures: Any) -> None:
        """Keeps the fine-tuned model and what is known of it."""
        unfinished = self.dense.with_name("dense.unfinished")
        trainer.save_model(str(unfinished), _internal_call=True)  # Else it is pushed to the Hub, too.
        if trainer.is_world_process_zero():
            write_text(unfinished / "figures.json", json.dumps(figures))
            os.replace(unfinished, self.dense)
        trainer.accelerator.wait_for_everyone()

    def figures(self) -> dict[str, Any]:
        """What `save_dense` was told."""
        return json.loads((self.dense / "figures.json").read_text(encoding="utf-8"))

    def scores(self, trainer: HapTrainer) -> Sensitivity:
        """Scores of the trainer's model, the dense one; those on disk, if there are any."""
        if self._scores.exists():
            return Sensitivity.load(self._scores)
        sensitivity = trainer.estimate_sensitivity()
        trainer.accelerator.wait_for_everyone()  # Else a late process finds the file and leaves the others waiting.
        if trainer.is_world_process_zero():
            sensitivity.save(self._scores)
        trainer.accelerator.wait_for_everyone()
        return sensitivity

    def finish(self) -> None:
        """Removes the folder, and files that a killed run was writing."""
        for left in self.output.glob(".unfinished-*"):
            left.unlink()
        (self.folder / "command.json").unlink()
        shutil.rmtree(self.folder)
