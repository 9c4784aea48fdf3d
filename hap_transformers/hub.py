"""Uploads to the Hub, under the path that the documentation names."""

from .reporting.hub import push_to_hub


__all__ = ["push_to_hub"]
