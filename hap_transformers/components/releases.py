"""Every difference between releases of Transformers that the package reacts to."""

from typing import Any

import transformers
from packaging import version


_TRANSFORMERS = version.parse(transformers.__version__)

TRANSFORMERS_4 = _TRANSFORMERS.major == 4

# The training argument that puts texts of like length into a batch, which saves padding.
GROUPED_BY_LENGTH = {"group_by_length": True} if TRANSFORMERS_4 else {"train_sampling_strategy": "group_by_length"}

# The training argument with the share of the steps in which the learning rate rises.
WARMUP_SHARE = "warmup_ratio" if TRANSFORMERS_4 else "warmup_steps"

# The image processor that resizes and normalizes without torchvision.
IMAGE_PROCESSOR = "ViTImageProcessor" if TRANSFORMERS_4 else "ViTImageProcessorPil"

# The modules of ViT and its relatives got the names that language models use.
VIT_RENAMED = _TRANSFORMERS >= version.parse("5.9.0")

# The modules of DINOv2 did later, and its fused gates and neurons became two projections.
DINOV2_RENAMED = _TRANSFORMERS >= version.parse("5.18.0")

# The attention of CLIP and SigLIP took the width of its heads for that of its input.
TOWERS_OF_INPUT_WIDTH = _TRANSFORMERS < version.parse("5.5.0")

# The language models of Gemma 3 did not say where their base model is.
GEMMA3_LAYERS = "model.layers" if TRANSFORMERS_4 else "layers"


def writes_safetensors(args: Any) -> bool:
    """Whether a training saves weights as safetensors. Transformers 5 saves nothing else."""
    return not TRANSFORMERS_4 or args.save_safetensors
