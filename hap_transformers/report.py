"""The page about a run: the documented import path."""

from .reporting.page import write_report


__all__ = ["write_report"]
