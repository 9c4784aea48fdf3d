"""How much each head and neuron matters: one file a method, all with the same signature."""

from .estimate import METHODS, estimate_sensitivity, validate_scoring
from .report import Sensitivity
from .scores import COMPARABLE_METHODS


__all__ = ["COMPARABLE_METHODS", "METHODS", "Sensitivity", "estimate_sensitivity", "validate_scoring"]
