"""The `hap` command: scores, plans, prunes and measures models from the shell."""

from .app import app, main


__all__ = ["app", "main"]
