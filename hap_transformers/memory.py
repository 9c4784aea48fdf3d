"""Limits on memory, and errors that say what was done when it ran out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size
from accelerate.utils.modeling import convert_file_size_to_int


def memory_limit(max_memory: int | str | None) -> int | None:
    """Number of bytes.

    Args:
        max_memory (`int` or `str`, *optional*): Bytes, or a text such as `"8GB"` or `"500MiB"`.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> memory_limit("8GB"), memory_limit(1024), memory_limit(None)
        (8000000000, 1024, None)
    """
    try:
        limit = None if max_memory is None else int(convert_file_size_to_int(max_memory))
    except (AttributeError, ValueError):
        limit = -1
    if limit is not None and limit <= 0:
        raise ValueError(f"`max_memory` is a number of bytes or a text such as '8GB', got {max_memory!r}.")
    return limit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a processor or an accelerator is used up."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or isinstance(error, Exception) and should_reduce_batch_size(error)


@contextmanager
def named_out_of_memory(phase: str, advice: str) -> Iterator[None]:
    """Says what was done when the memory ran out, and what to do.

    Args:
        phase (`str`): What was done, as in "while the model was refitted".
        advice (`str`): Sentences.

    Raises:
        torch.OutOfMemoryError: In place of the allocator's error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(
            f"Out of memory while {phase}. {advice} The model is as it was. ({error})"
        ) from error
