"""How much each component matters: one file per method, which registers itself."""

from . import kronecker, gauss_newton, hutchinson, gradient, fisher, magnitude, random  # noqa: F401, I001 (as listed)
from .estimate import estimate_sensitivity, validate_scoring
from .methods import METHODS, Method, register_method
from .self_loss import SelfLoss
from .sensitivity import Sensitivity


__all__ = [
    "METHODS",
    "Method",
    "SelfLoss",
    "Sensitivity",
    "estimate_sensitivity",
    "register_method",
    "validate_scoring",
]
