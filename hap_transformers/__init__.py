"""Structured pruning for Hugging Face Transformers with second-order sensitivity.

Importing the package makes pruned checkpoints loadable by plain `from_pretrained`, `model.prune_heads` available, and
`model.push_to_hub` upload a card with pruned models.
"""

from . import checkpoint as checkpoint
from . import hub as hub
from .architectures import ARCHITECTURES, Architecture
from .callbacks import HapCallback
from .config import HapConfig
from .latency_table import LatencyTable
from .plan import PruningPlan
from .planning import plan_pruning
from .reconstruction import reconstruct
from .remote_code import export_remote_code
from .sensitivity import METHODS, Sensitivity, estimate_sensitivity
from .surgery import apply_plan, prune_heads
from .trainer import HapTrainer
from .version import __version__


__all__ = [
    "ARCHITECTURES",
    "METHODS",
    "Architecture",
    "HapCallback",
    "HapConfig",
    "HapTrainer",
    "LatencyTable",
    "PruningPlan",
    "Sensitivity",
    "__version__",
    "apply_plan",
    "estimate_sensitivity",
    "export_remote_code",
    "plan_pruning",
    "prune_heads",
    "reconstruct",
]
