"""Models that Transformers read from a GGUF file: quantized in the file, but with ordinary weights in memory."""

from typing import Any

from transformers import PreTrainedModel


GGUF = "gguf"
# What Transformers 5 sets on a model that it takes for quantized.
MARKS = ("hf_quantizer", "is_quantized", "quantization_method")


def quantized_by(model: PreTrainedModel) -> str | None:
    """The method by which a model's weights are quantized, or `None` if they are ordinary numbers.

    Transformers 5 calls a model quantized that it read from a GGUF file, also where it has made floats of all weights.
    """
    method = _method(getattr(model.config, "quantization_config", None))
    return None if method == GGUF and _has_floats_alone(model) else method


def forget_gguf(model: PreTrainedModel) -> None:
    """Makes an ordinary model of one whose weights were read from a GGUF file into floats; others stay as they are.

    Else Transformers 5 refuses to train or save it.
    """
    if not _has_floats_alone(model):
        return
    if _method(getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)) == GGUF:
        for mark in MARKS:
            vars(model).pop(mark, None)
    if _method(getattr(model.config, "quantization_config", None)) == GGUF:
        del model.config.quantization_config


def _has_floats_alone(model: PreTrainedModel) -> bool:
    return all(parameter.is_floating_point() for parameter in model.parameters())


def _method(entry: Any) -> str | None:
    """The method that a config's entry names, which may be a dictionary or an object."""
    found = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    return None if found is None else getattr(found, "value", found)
