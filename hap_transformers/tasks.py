"""GLUE tasks and custom files, under the path that the documentation names."""

from .data.tasks import GLUE_TEXTS, Task, load_task, load_tokenizer


__all__ = ["GLUE_TEXTS", "Task", "load_task", "load_tokenizer"]
