"""Tiny models beside the zoo's: single towers, and other forms of the zoo's vision Transformers."""

from dataclasses import replace

import torch
import transformers
from transformers import Dinov2Config, SwinConfig
from zoo import (
    DINOV2_RENAMED,
    NEW_VIT_PATHS,
    OLD_VIT_PATHS,
    ZOO,
    Tiny,
)

from hap_transformers.components.releases import TRANSFORMERS_4


CLIP = ZOO["clip"]
PATHS = (CLIP.heads_in, CLIP.heads_out, CLIP.neurons_in, CLIP.neurons_out)
IMAGES, TEXTS = {"image_size": 8, "patch_size": 4}, {"eos_token_id": 2, "projection_dim": 8}
MLP = (NEW_VIT_PATHS if DINOV2_RENAMED else OLD_VIT_PATHS)[:2]
SHARED = {"use_shared_relative_position_bias": True}
DINOV2 = replace(ZOO["dinov2"], heads_in=MLP[0], heads_out=MLP[1])


def _tower(family: str, kind: str, task: str, prefix: str) -> Tiny:
    images = kind == "Vision"
    sizes = IMAGES if images else TEXTS
    layer = prefix + "encoder.layers.{}"
    return Tiny(family + kind, layer, *PATHS, sizes, task=task, inputs="image" if images else "text")


# Towers of newer releases are the models themselves.
TOWERS = {
    "clip_vision_model": _tower("CLIP", "Vision", "ModelWithProjection", "vision_model."),
    "clip_text_model": _tower("CLIP", "Text", "ModelWithProjection", "text_model."),
    "siglip_vision_model": _tower("Siglip", "Vision", "Model", "vision_model." if TRANSFORMERS_4 else ""),
    "siglip_text_model": _tower("Siglip", "Text", "Model", "text_model." if TRANSFORMERS_4 else ""),
    "dinov2_with_registers": replace(
        ZOO["dinov2"], family="Dinov2WithRegisters", layer="dinov2_with_registers.encoder.layer.{}"
    ),
    "beit-shared": replace(ZOO["beit"], sizes={**IMAGES, **SHARED}),
    "beit-both": replace(ZOO["beit"], sizes={**ZOO["beit"].sizes, **SHARED}),
}


def first_output(model: torch.nn.Module, tiny: Tiny) -> torch.Tensor:
    """What a model returns first on its architecture's batch: an embedding, hidden states or logits."""
    return model(**tiny.batch(dtype=model.dtype))[0]


def swin(**changes):
    """Two stages of two layers, of which the second of each is shifted; the second stage has twice the heads."""
    sizes = {
        "image_size": 24,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    torch.manual_seed(0)
    config = SwinConfig(**{**sizes, "mlp_ratio": 2.0, "num_labels": 3, "drop_path_rate": 0.0, **changes})
    model = transformers.SwinForImageClassification(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def images(size=24, count=6, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dinov2(gated):
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "mlp_ratio": 2, "num_labels": 3}
    config = Dinov2Config(**sizes, use_swiglu_ffn=gated, image_size=8, patch_size=4)
    torch.manual_seed(0)
    model = transformers.Dinov2ForImageClassification(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model
