"""Where a config says how its model was pruned."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig


METHOD = "hap"
# The entry that says that all layers have one size.
UNIFORM = "uniform"


def recorded_structure(config: PretrainedConfig) -> dict[str, Any] | None:
    """The structure in a config, or `None` if it records none."""
    recorded = getattr(config, "quantization_config", None)
    if recorded is None:
        return None
    recorded = dict(recorded) if isinstance(recorded, Mapping) else recorded.to_dict()
    return recorded if recorded.get("quant_method") == METHOD else None
