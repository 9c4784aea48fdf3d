"""Makes `from_pretrained` rebuild a pruned model's structure, and `model.prune_heads` work for every architecture.

Transformers lets a quantizer change a model between its construction and the loading of its weights. This is its only
extension point for changes of the structure, so this module registers a quantizer. It does not quantize: a loaded
model is an ordinary model whose config records its sizes.
"""

import copy
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..components.architectures import ARCHITECTURES
from ..components.depth import layers_left_out, layers_to_leave_out, renamed
from ..components.embedding_dims import validate_resizable
from ..components.gguf import forget_gguf
from ..components.groups import KINDS, find_groups, freeze_idle_parameters
from ..components.plain_config import saved_config
from ..components.projections import Projection
from ..components.releases import TRANSFORMERS_4
from ..components.structure import (
    METHOD,
    filters_apart,
    number_left,
    rebuild_structure,
    recorded_counts,
    recorded_structure,
    validate_savable,
)
from ..surgery.apply_plan import prune_heads
from .remote_code import EXPORTED


@register_quantization_config(METHOD)
class HapStructure(QuantizationConfigMixin):
    """The sizes of a pruned model, which `config.json` stores under `quantization_config`.

    Args:
        quant_method (`str`): `"hap"`.
        structure: The structure that [`record_structure`] wrote. It is validated when a model is built from it.
    """

    def __init__(self, quant_method: str = METHOD, **structure: Any):
        self.quant_method = quant_method  # type: ignore[assignment]  # The enum has only what Transformers ships.
        self.structure = structure

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry of the config."""
        return {"quant_method": self.quant_method, **copy.deepcopy(self.structure)}


@register_quantizer(METHOD)
class HapStructureLoader(HfQuantizer):
    """Prunes the newly built model before its weights are loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        structure = self.quantization_config.to_dict()
        name = model.config.name_or_path
        # Transformers 4 does not pass the files. With `subfolder` it reads other files than those in this folder.
        if checkpoint_files is None and name and _holds(Path(name), structure):
            safe = [str(file) for file in Path(name).glob("model*.safetensors")]
            checkpoint_files = safe or [str(file) for file in Path(name).glob("pytorch_model*.bin")]
        validate_weights(model, structure, checkpoint_files or ())
        rebuild_structure(model, structure)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):  # Marks that Transformers sets on quantized models.
                vars(part.config).pop("_is_quantized", None)
                vars(part.config).pop("_pre_quantization_dtype", None)
        for name in (f"pruned_{kind.name}" for kind in KINDS.values() if kind.keeps_numbers):
            if (recorded := getattr(model.config, name, None)) is not None:
                setattr(model.config, name, {int(layer): numbers for layer, numbers in recorded.items()})
        model.config.quantization_config = self.quantization_config.to_dict()
        _forget_exported_code(model)
        freeze_idle_parameters(find_groups(model))  # Transformers makes all loaded parameters require gradients.
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Always true: a pruned model is saved like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Always true: a pruned model is trained like any other."""
        return True


def validate_weights(model: PreTrainedModel, structure: Mapping[str, Any], files: Sequence[str]) -> None:
    """Checks that a checkpoint's weights are safetensors and have the sizes that its config records.

    The check reads only the files' headers. It skips weights that Transformers renames on loading; Transformers checks
    their sizes itself.

    Args:
        model (`PreTrainedModel`): The dense model, possibly on the meta device.
        structure (`Mapping[str, Any]`): The recorded structure.
        files (`Sequence[str]`): The checkpoint's weight files.

    Raises:
        ValueError: If a file is not safetensors, a size does not match, or the structure is invalid (see
            [`recorded_counts`]).
    """
    shapes: dict[str, list[int]] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(f"Pruned models can be loaded from safetensors only, not from '{file}'.")
        with safe_open(file, framework="pt") as tensors:
            shapes.update({name: tensors.get_slice(name).get_shape() for name in tensors.keys()})
    stored = sum(math.prod(shape) for shape in shapes.values())
    sizes: dict[str, tuple[Projection, list[int]]] = {}
    for group, left in recorded_counts(model, structure):
        dense, count = max(group.num_components, 1), number_left(left)
        apart = filters_apart(group, structure)
        known = [
            (projection, sizes.setdefault(projection.name, (projection, _sizes(projection)))[1])
            for projection in group.projections
            if group.runs is None or projection.parts == 1  # Transformers itself checks the size of fused ones.
        ]
        for projection, size in known:
            if projection in group.readers:
                size[1] = projection.in_features // dense * count
            else:
                whole = count - apart if projection in group.writers else count
                size[0] = projection.out_features * projection.parts // dense * whole
        if files and max((math.prod(size) for _, size in known), default=0) > stored:
            raise ValueError(
                f"The checkpoint's config gives layer {group.layer} {count} {group.kind.name}, but the weight files "
                "are too small for them. The config and the weights do not belong together."
            )
    for projection, size in sizes.values():
        expected = projection.stored_shape(*size)
        for name in (f"{projection.name}.weight", f"{model.base_model_prefix}.{projection.name}.weight"):
            if shapes.get(name, expected) != expected:
                raise ValueError(
                    f"The checkpoint's config gives '{name}' the shape {expected}, but its weights have "
                    f"{shapes[name]}. The config and the weights do not belong together."
                )


def _sizes(projection: Projection) -> list[int]:
    """Outputs of a projection's module, and its inputs."""
    return [projection.out_features * projection.parts, projection.in_features]


def _forget_exported_code(model: PreTrainedModel) -> None:
    """Takes exported code out of the config of a model that was not made by it: a save would not copy that code."""
    if type(model).__module__.startswith("transformers_modules"):
        return
    named: dict[str, str] = getattr(model.config, "auto_map", None) or {}
    kept = {auto_class: path for auto_class, path in named.items() if f"{EXPORTED}." not in path}
    if kept:
        model.config.auto_map = kept
    else:
        vars(model.config).pop("auto_map", None)


def _holds(folder: Path, structure: Mapping[str, Any]) -> bool:
    """Whether a folder's config records this structure."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("quantization_config") == structure


_save_pretrained = PreTrainedModel.save_pretrained


@functools.wraps(_save_pretrained)
def _save_pretrained_method(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    validate_savable(self)
    if TRANSFORMERS_4 and kwargs.get("safe_serialization") is False and recorded_structure(self.config) is not None:
        raise ValueError(
            "safe_serialization=False saves pytorch_model.bin, and pruned models are loaded from safetensors only. "
            "Leave it out."
        )
    forget_gguf(self)
    config, gone = self.config, layers_to_leave_out(self)
    self.config = saved_config(self)
    try:
        if gone and kwargs.get("state_dict") is not None:
            kwargs["state_dict"] = renamed(self, kwargs["state_dict"], gone)
        with layers_left_out(self, gone):
            return _save_pretrained(self, *args, **kwargs)
    finally:
        self.config = config


PreTrainedModel.save_pretrained = _save_pretrained_method  # type: ignore[method-assign]

_resize_token_embeddings = PreTrainedModel.resize_token_embeddings


@functools.wraps(_resize_token_embeddings)
def _resize_token_embeddings_method(self: PreTrainedModel, new_num_tokens: int | None = None, *args, **kwargs) -> Any:
    if new_num_tokens is not None:
        validate_resizable(self)
    return _resize_token_embeddings(self, new_num_tokens, *args, **kwargs)


PreTrainedModel.resize_token_embeddings = _resize_token_embeddings_method  # type: ignore[method-assign]

_prune_heads_of_transformers_4: Any = getattr(PreTrainedModel, "prune_heads", None)


def _prune_heads_method(self: PreTrainedModel, heads_to_prune: dict[int, list[int]]) -> None:
    """Removes attention heads; see [`hap_transformers.prune_heads`]."""
    # Transformers 4 calls this for every new model, and for each part of it, with the config's `pruned_heads`.
    new = TRANSFORMERS_4 and heads_to_prune is self.config.pruned_heads
    if new and recorded_structure(self.config) is not None:
        return  # The loader prunes the heads after the whole model is built.
    if new or (TRANSFORMERS_4 and self.config.model_type not in ARCHITECTURES):
        _prune_heads_of_transformers_4(self, heads_to_prune)
    else:
        prune_heads(self, heads_to_prune)


PreTrainedModel.prune_heads = _prune_heads_method  # type: ignore[attr-defined]  # Transformers 5 has no such method.
