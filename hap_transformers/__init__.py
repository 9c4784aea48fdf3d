"""Structured pruning for Hugging Face Transformers with second-order sensitivity.

Importing the package makes pruned checkpoints loadable by plain `from_pretrained`, `model.prune_heads` available, and
`model.push_to_hub` upload a card with pruned models.
"""

from typing import TYPE_CHECKING, Any

from . import checkpoints as checkpoints
from . import hub as hub
from .alignment.align_embeddings import align_embeddings
from .alignment.align_heads import align_heads
from .checkpoints.remote_code import export_remote_code
from .components.architectures import ARCHITECTURES
from .components.groups import emptied_modules
from .components.names import Architecture, Chain, ChannelNames, DecoderNames, EmbeddingNames, HeadNames, NeuronNames
from .planning.latency_table import LatencyTable
from .planning.plan_pruning import plan_pruning
from .planning.settings import PlanningSettings
from .refit.reconstruct import reconstruct
from .refit.tune_layers import tune_layers
from .sensitivity import METHODS, Method, SelfLoss, Sensitivity, estimate_sensitivity, register_method
from .surgery.apply_plan import apply_plan, prune_heads
from .surgery.plan import PruningPlan
from .training.callbacks import HapCallback
from .training.config import HapConfig
from .training.trainer import HapTrainer, HapTrainerMixin
from .version import __version__
from .vocabulary.plan import VocabularyPlan
from .vocabulary.trim import apply_vocabulary, plan_vocabulary, trim_vocabulary


if TYPE_CHECKING:
    from .data.glue_metric import GlueMetric as GlueMetric


__all__ = [
    "ARCHITECTURES",
    "METHODS",
    "Architecture",
    "Chain",
    "ChannelNames",
    "DecoderNames",
    "EmbeddingNames",
    "GlueMetric",
    "HapCallback",
    "HapConfig",
    "HapTrainer",
    "HapTrainerMixin",
    "HeadNames",
    "LatencyTable",
    "Method",
    "NeuronNames",
    "PlanningSettings",
    "PruningPlan",
    "SelfLoss",
    "Sensitivity",
    "VocabularyPlan",
    "__version__",
    "align_embeddings",
    "align_heads",
    "apply_plan",
    "apply_vocabulary",
    "emptied_modules",
    "estimate_sensitivity",
    "export_remote_code",
    "plan_pruning",
    "plan_vocabulary",
    "prune_heads",
    "reconstruct",
    "register_method",
    "trim_vocabulary",
    "tune_layers",
]


def __getattr__(name: str) -> Any:
    if name == "GlueMetric":  # Here: `evaluate` takes a second, which importing the package should not.
        from .data.glue_metric import GlueMetric

        return GlueMetric
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
