"""Plots of scores and structures, under the path that the documentation names."""

from .reporting.plots import plot_head_sensitivity, plot_structure


__all__ = ["plot_head_sensitivity", "plot_structure"]
