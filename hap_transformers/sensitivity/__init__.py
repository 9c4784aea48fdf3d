"""How much each head and neuron matters: one file a method, all with the same signature."""

from .estimate import METHODS, estimate_sensitivity, validate_scoring
from .scores import COMPARABLE_METHODS
from .sensitivity import Sensitivity


__all__ = ["COMPARABLE_METHODS", "METHODS", "Sensitivity", "estimate_sensitivity", "validate_scoring"]
