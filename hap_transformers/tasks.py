"""GLUE tasks and custom files: the documented import path."""

from .data.tasks import GLUE_TEXTS, Task, load_task
from .data.tokenizers import load_tokenizer


__all__ = ["GLUE_TEXTS", "Task", "load_task", "load_tokenizer"]
