"""The page about a run, under the path that the documentation names."""

from .reporting.page import write_report


__all__ = ["write_report"]
