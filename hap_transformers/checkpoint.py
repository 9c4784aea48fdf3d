"""Makes plain `from_pretrained` rebuild a pruned model's structure, and `model.prune_heads` work everywhere.

Transformers lets a quantizer change a model between its construction and the loading of its weights; that is the one
extension point for structure changes. Nothing here quantizes: once loaded, the model is an ordinary one again, whose
config remembers its sizes.
"""

from typing import Any

import transformers
from packaging import version
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .architectures import ARCHITECTURES
from .blocks import attention_blocks
from .surgery import prune_heads, resize_linear, set_head_count, validate_prunable


TRANSFORMERS_4 = version.parse(transformers.__version__).major == 4


@register_quantization_config("hap")
class HapStructure(QuantizationConfigMixin):
    """The sizes of a pruned model, as `config.json` holds them under `quantization_config`.

    Args:
        heads (`dict[str, int]`): Layer number to the number of heads left, for each pruned layer.
        linears (`dict[str, list[int]]`): Path from `model.base_model` of each resized projection to its new
            `[in_features, out_features]`.
    """

    def __init__(self, heads: dict[str, int], linears: dict[str, list[int]], quant_method: str = "hap"):
        self.quant_method = quant_method
        self.heads = heads
        self.linears = linears


@register_quantizer("hap")
class HapStructureLoader(HfQuantizer):
    """Resizes the still empty model before its weights are loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        rebuild_structure(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)
        model.config.pruned_heads = {int(layer): heads for layer, heads in model.config.pruned_heads.items()}
        model.config.quantization_config = self.quantization_config.to_dict()
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """A pruned model is saved like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A pruned model is trained like any other."""
        return True


def rebuild_structure(model: PreTrainedModel, structure: HapStructure) -> None:
    """Resizes a dense model's projections to the sizes recorded in a checkpoint.

    Args:
        model (`PreTrainedModel`): The model as built from its config, possibly on the meta device.
        structure (`HapStructure`): The recorded sizes. They are validated before anything is resized.

    Raises:
        ValueError: If the record names a layer or module that does not exist, or a size that is not a whole number
            between zero and the dense model's, or if head counts and sizes contradict each other.
    """
    base = model.base_model
    linears = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    for name, sizes in structure.linears.items():
        if name not in linears:
            raise ValueError(
                f"The checkpoint's config resizes '{name}', but {type(base).__name__} has no such Linear."
            )
        dense = [linears[name].in_features, linears[name].out_features]
        if len(sizes) != 2 or any(type(s) is not int or not 0 <= s <= d for s, d in zip(sizes, dense, strict=False)):
            raise ValueError(f"The checkpoint's config gives '{name}' the sizes {sizes}; expected at most {dense}.")
    validate_prunable(model)
    blocks = {str(block.index): block for block in attention_blocks(model)}
    pruned = {str(layer): heads for layer, heads in (getattr(model.config, "pruned_heads", None) or {}).items()}
    for layer, count in structure.heads.items():
        if layer not in blocks:
            raise ValueError(f"The checkpoint's config names layer {layer}; the model has {len(blocks)} layers.")
        block = blocks[layer]
        if block.num_original_heads - len(pruned.get(layer, ())) != count:
            raise ValueError(
                f"The checkpoint's config gives layer {layer} {count} heads, but its pruned_heads names "
                f"{pruned.get(layer, [])} of {block.num_original_heads}."
            )
        width = count * block.head_dim
        expected = {projection.name: [projection.module.in_features, width] for projection in block.inputs}
        expected[block.output.name] = [width, block.output.module.out_features]
        for name, sizes in expected.items():
            if structure.linears.get(name) != sizes:
                raise ValueError(
                    f"The checkpoint's config gives layer {layer} {count} heads but '{name}' the sizes "
                    f"{structure.linears.get(name)}; {sizes} would fit."
                )
    for name, (in_features, out_features) in structure.linears.items():
        resize_linear(linears[name], in_features, out_features)
    for layer, count in structure.heads.items():
        set_head_count(blocks[layer], count)


_prune_heads_of_transformers_4 = PreTrainedModel.prune_heads if TRANSFORMERS_4 else None


def _prune_heads_method(self: PreTrainedModel, heads_to_prune: dict[int, list[int]]) -> None:
    """Removes attention heads; see [`hap_transformers.prune_heads`]."""
    architecture = ARCHITECTURES.get(self.config.model_type)
    if TRANSFORMERS_4 and (architecture is None or architecture.fused):
        _prune_heads_of_transformers_4(self, heads_to_prune)
    else:
        prune_heads(self, heads_to_prune)


PreTrainedModel.prune_heads = _prune_heads_method
