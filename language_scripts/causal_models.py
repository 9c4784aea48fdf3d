"""Loads causal language models and their tokenizers: by Hub name, from a folder, or from a GGUF file."""

from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hap_transformers.components.architectures import ARCHITECTURES
from hap_transformers.components.gguf import forget_gguf
from hap_transformers.components.record import recorded_structure
from hap_transformers.data.tokenizers import load_tokenizer


DTYPES = ("float32", "bfloat16", "float16")


def located(name: str) -> tuple[str, dict[str, str]]:
    """Where Transformers finds a model, and the argument that names a GGUF file.

    Args:
        name (`str`): Hub name, folder, or path of a `.gguf` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If the package that reads such files is not installed.
    """
    if not name.endswith(".gguf"):
        return name, {}
    if not Path(name).is_file():
        raise FileNotFoundError(f"There is no file '{name}'.")
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"'{name}' is a GGUF file; `pip install gguf` to read it.") from error
    return str(Path(name).parent), {"gguf_file": Path(name).name}


def load_config(name: str) -> PretrainedConfig:
    """Loads the config of the model to begin with.

    Raises:
        ValueError: If the model is pruned, or of a type that is not supported.
    """
    folder, file = located(name)
    config = AutoConfig.from_pretrained(folder, **file)
    if recorded_structure(config) is not None:
        raise ValueError(
            f"'{name}' is pruned already, and this script begins with a dense model. To prune further, call "
            "HapTrainer.prune() in Python."
        )
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"'{name}' has model type '{config.model_type}'. Supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    return config


def load_causal_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer of a model, or of a folder of its own."""
    folder, file = located(name)
    return load_tokenizer(folder, **file)


def load_model(name: str, config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    """Loads a model, if its weights fit into the memory.

    Args:
        name (`str`): As for [`located`].
        config (`PretrainedConfig`): Its config.
        dtype (`str`): One of `DTYPES`.

    Raises:
        ValueError: If they do not, or the model cannot be loaded.
    """
    folder, file = located(name)
    validate_memory(name, config, dtype)
    given: dict[str, Any] = {"dtype": getattr(torch, dtype), **(file or {"config": config})}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **given)
    except OSError:  # They name the folder.
        raise
    except Exception as error:  # Readers of weights raise what they like.
        raise ValueError(f"'{name}' cannot be loaded: {error}") from error
    forget_gguf(model)
    model.config.name_or_path = Path(name).stem if file else name
    return model


def validate_memory(name: str, config: PretrainedConfig, dtype: str) -> None:
    """Refuses a model whose weights alone need more memory than there is. Nothing is loaded for that.

    Raises:
        ValueError: If they do.
    """
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    needed, free = count * getattr(torch, dtype).itemsize, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"'{name}' has {count:,} parameters, which take {needed / 2**30:.1f} GiB in {dtype}; "
            f"{free / 2**30:.1f} GiB of memory are free. Take a smaller model, a larger machine, or --dtype bfloat16."
        )
