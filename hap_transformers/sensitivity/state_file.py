"""Keeps what a scoring run has done on disk, so that it can be interrupted."""

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
    """How far scoring has come.

    Args:
        moments (`SampleMoments`): The samples so far, of all processes.
        num_probes (`int`): Probes a batch that were drawn.
        batches_done (`int`): Batches behind us.
        converged (`bool`, *optional*): Whether the wanted reliability was reached; `None` if none was wanted.
    """

    moments: SampleMoments
    num_probes: int = 0
    batches_done: int = 0
    converged: bool | None = None


@dataclass
class StateFile:
    """A safetensors file with the moments so far, and what run they belong to.

    Args:
        path (`Path`): Where it lies.
        run (`dict[str, Any]`): What two calls must agree in for the one to go on where the other stopped.
        accelerator (`Accelerator`, *optional*): Its main process reads and writes for all.
    """

    path: Path
    run: dict[str, Any]
    accelerator: Accelerator | None = None

    @property
    def _is_mine(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    def save(self, progress: Progress) -> None:
        """Writes the file all at once: whoever is interrupted meanwhile finds the one before."""
        if not self._is_mine:
            return
        tensors = {field.name: getattr(progress.moments, field.name) for field in fields(SampleMoments)}
        plain = {"num_probes": progress.num_probes, "batches_done": progress.batches_done, "run": self.run}
        with whole_file(self.path) as unfinished:
            save_file(tensors, str(unfinished), metadata={"scoring": json.dumps(plain)})

    def load(self, fresh: Progress) -> Progress:
        """Reads what `save` wrote, or gives `fresh` where there is nothing; the same in every process.

        Raises:
            ValueError: If the file is no state file, or that of another run.
        """
        found = [self._read(fresh) if self._is_mine else fresh]
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        return found[0]

    def delete(self) -> None:
        """Removes the file: the run it belongs to is finished."""
        if self._is_mine:
            self.path.unlink(missing_ok=True)

    def _read(self, fresh: Progress) -> Progress | ValueError:
        # An error is returned, not raised, so that the other processes hear of it instead of waiting forever.
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
                f"The state file '{self.path}' is of another run: it differs in {', '.join(different)}. Delete it to "
                "start afresh, or repeat the interrupted call as it was."
            )
        return Progress(moments, *counts)
