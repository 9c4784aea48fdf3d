"""Saves the progress of a scoring run in a file, so that an interrupted run can continue."""

import json
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import whole_file
from .statistics import SampleMoments


# Seconds that writing may take to be repeated after every batch. Otherwise it pauses for so many times as long.
QUICK = 0.1
PAUSE = 20


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


def validate_state_file(path: str | Path) -> None:
    """Checks that a file is a state file, of whatever run.

    Raises:
        Exception: If it is not.
    """
    with safe_open(str(path), framework="pt") as file:
        json.loads(file.metadata()["scoring"])


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
    _due: float = field(default=0.0, init=False)

    @property
    def _is_mine(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    def is_due(self) -> bool:
        """Whether enough time has passed since the last writing; the same in every process."""
        due = [time.monotonic() >= self._due]
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            broadcast_object_list(due)
        return due[0]

    def save(self, progress: Progress) -> None:
        """Writes the file atomically: if writing is interrupted, the previous file stays."""
        if not self._is_mine:
            return
        start = time.monotonic()
        tensors = {field.name: getattr(progress.moments, field.name) for field in fields(SampleMoments)}
        plain = {"num_probes": progress.num_probes, "batches_done": progress.batches_done, "run": self.run}
        with whole_file(self.path) as unfinished:
            save_file(tensors, str(unfinished), metadata={"scoring": json.dumps(plain)})
        took = time.monotonic() - start
        if took > QUICK:
            self._due = time.monotonic() + PAUSE * took

    def load(self, fresh: Progress) -> Progress:
        """Reads the progress that `save` wrote.

        Args:
            fresh (`Progress`): The progress to return if there is no file.

        Returns:
            `Progress`: How far the run is, the same in every process. The moments are the main process's.

        Raises:
            ValueError: If the file is not a state file, or belongs to another run.
        """
        found = self._read(fresh) if self._is_mine else fresh
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            told: list[Any] = [found]
            if isinstance(found, Progress):
                told = [(found.moments.totals.tolist(), found.num_probes, found.batches_done)]
            broadcast_object_list(told)
            if isinstance(told[0], ValueError):
                found = told[0]
            elif not self._is_mine:
                totals, *counts = told[0]
                moments = replace(fresh.moments, totals=fresh.moments.totals.new_tensor(totals))
                found = Progress(moments, *counts)
        if isinstance(found, ValueError):
            raise found
        return found

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
                device = fresh.moments.mean.device
                moments = SampleMoments(**{name: file.get_tensor(name).to(device) for name in file.keys()})
            run, counts = plain["run"], (plain["num_probes"], plain["batches_done"])
        except (SafetensorError, KeyError, RecursionError, TypeError, ValueError) as error:
            return ValueError(f"'{self.path}' is not a state file of estimate_sensitivity: {error!r}. Name another.")
        different = sorted(name for name in self.run if run.get(name) != self.run[name])
        if different:
            return ValueError(
                f"The state file '{self.path}' belongs to another run: it differs in {', '.join(different)}. Delete "
                "it to start from the beginning, or repeat the interrupted call with its original arguments."
            )
        return Progress(moments, *counts)
