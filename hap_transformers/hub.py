"""Uploads to the Hub: the documented import path."""

from .reporting.hub import push_to_hub


__all__ = ["push_to_hub"]
