"""What a refit keeps between its passes: in memory up to a limit, in a temporary folder beyond it."""

import tempfile
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..sensitivity.outputs import tensors_in


# On a processor. Hidden states of 1,024 texts of 128 tokens and width 768 in float32 are 400 MB.
LIMIT = 512 * 10**6


def default_limit(device: torch.device) -> int:
    """Bytes to keep in memory: a fixed number on a processor, a quarter of what is free on an accelerator."""
    if device.type != "cuda":
        return LIMIT
    return max(LIMIT, torch.cuda.mem_get_info(device)[0] // 4)


class KeptValues:
    """Values with tensors, by key. Those for which the memory has no room are files of a temporary folder.

    To keep hidden states costs a write and a read a pass. To compute them anew costs the passes through all earlier
    layers, which is more from the second layer on. The folder is deleted at the end of the context.

    Args:
        limit (`int`): Bytes of tensors to hold in memory.

    Example:

    ```python
    with KeptValues(limit=10**9) as kept:
        kept["first"] = model(**batch).hidden_states
    ```
    """

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self._values: dict[Hashable, tuple[int, Any]] = {}
        self._files: dict[Hashable, Path] = {}
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "KeptValues":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._values.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __setitem__(self, key: Hashable, value: Any) -> None:
        size, _ = self._values.pop(key, (0, None))
        self.held -= size
        size = sum(tensor.nbytes for tensor in tensors_in(value))
        if self.held + size <= self.limit:
            self._values[key] = (size, value)
            self.held += size
        else:
            self._write(key, value)

    def __getitem__(self, key: Hashable) -> Any:
        if key in self._values:
            return self._values[key][1]
        # The file is this object's own, so that it may hold any class.
        return torch.load(self._files[key], weights_only=False)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values or key in self._files

    def _write(self, key: Hashable, value: Any) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="hap_refit_")
        file = self._files.setdefault(key, Path(self._folder.name) / f"{len(self._files)}.pt")
        try:
            torch.save(value, file)
        except (OSError, RuntimeError) as error:  # torch raises the second where the disk is full.
            raise OSError(
                f"The refit's hidden states do not fit into the temporary folder '{self._folder.name}': {error}. Set "
                "TMPDIR to a folder with more room, raise max_memory, or refit on fewer examples."
            ) from error
