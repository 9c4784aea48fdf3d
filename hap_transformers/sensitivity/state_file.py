"""Saves the progress of a scoring run in a file, so that an interrupted run can continue."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import whole_file
from .statistics import SampleMoments


@dataclass
class Progress:
    """The progress of scoring.

    Args:
        moments (`SampleMoments`): Moments of all processes' samples so far.
        num_probes (`int`): Random probes per batch.
        batches_done (`int`): Number of batches that are done.
        converged (`bool`, *optional*): Whether the requested reliability was reached. `None` if none was requested.
    """

    moments: SampleMoments
    num_probes: int = 0
    batches_done: int = 0
    converged: bool | None = None


@dataclass
class StateFile:
    """A safetensors file with the moments so far and a description of the run.

    Args:
        path (`Path`): Path of the file.
        run (`dict[str, Any]`): Describes the run. A call can continue from the file only if its description is equal.
        accelerator (`Accelerator`, *optional*): The processes. The main process reads and writes for all of them.
    """

    path: Path
    run: dict[str, Any]
    accelerator: Accelerator | None = None

    @property
    def _is_mine(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    def save(self, progress: Progress) -> None:
        """Writes the file atomically: if writing is interrupted, the previous file stays."""
        if not self._is_mine:
            return
        tensors = {field.name: getattr(progress.moments, field.name) for field in fields(SampleMoments)}
        plain = {"num_probes": progress.num_probes, "batches_done": progress.batches_done, "run": self.run}
        with whole_file(self.path) as unfinished:
            save_file(tensors, str(unfinished), metadata={"scoring": json.dumps(plain)})

    def load(self, fresh: Progress) -> Progress:
        """Reads the progress that `save` wrote.

        Args:
            fresh (`Progress`): The progress to return if there is no file.

        Returns:
            `Progress`: The same in every process.

        Raises:
            ValueError: If the file is not a state file, or belongs to another run.
        """
        found = [self._read(fresh) if self._is_mine else fresh]
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        return found[0]

    def delete(self) -> None:
        """Deletes the file after the run has finished."""
        if self._is_mine:
            self.path.unlink(missing_ok=True)

    def _read(self, fresh: Progress) -> Progress | ValueError:
        # The error is returned so that all processes raise it. If only this one raised, the others would wait forever.
        if not self.path.exists():
            return fresh
        try:
            with safe_open(str(self.path), framework="pt") as file:
                plain = json.loads(file.metadata()["scoring"])
                moments = SampleMoments(**{name: file.get_tensor(name) for name in file.keys()})
            run, counts = plain["run"], (plain["num_probes"], plain["batches_done"])
        except (SafetensorError, KeyError, RecursionError, TypeError, ValueError) as error:
            return ValueError(f"'{self.path}' is not a state file of estimate_sensitivity: {error!r}. Delete it.")
        different = sorted(name for name in self.run if run.get(name) != self.run[name])
        if different:
            return ValueError(
                f"The state file '{self.path}' belongs to another run: it differs in {', '.join(different)}. Delete "
                "it to start from the beginning, or repeat the interrupted call with its original arguments."
            )
        return Progress(moments, *counts)
