"""How much each head and neuron matters: one file a method, all with the same signature."""

from .estimate import METHODS, estimate_sensitivity, validate_scoring
from .report import Sensitivity


__all__ = ["METHODS", "Sensitivity", "estimate_sensitivity", "validate_scoring"]
