"""Plots of scores and structures: the documented import path."""

from .reporting.plots import plot_head_ranks, plot_head_sensitivity, plot_structure


__all__ = ["plot_head_ranks", "plot_head_sensitivity", "plot_structure"]
