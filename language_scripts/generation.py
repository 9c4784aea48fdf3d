"""Measures how fast language models generate."""

import statistics
import time
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from hap_transformers.data.tokenizers import longest_text


PROMPT, NEW, ROUNDS = 32, 32, 3


def tokens_per_second(models: Mapping[str, PreTrainedModel], ids: torch.Tensor) -> dict[str, float]:
    """Times greedy generation by several models in turns, of one text at a time.

    They generate 32 tokens, or fewer if they take no more than that with a prompt.

    Args:
        models (`Mapping[str, PreTrainedModel]`): The models by name.
        ids (`torch.Tensor`): Tokens that they go on from, shape `(1, tokens)`; at most 32 are used.

    Returns:
        `dict[str, float]`: Generated tokens a second, the median of three rounds.
    """
    limit = min(map(longest_text, models.values()))
    new = min(NEW, limit // 2)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(ROUNDS + 1):
        for name, model in models.items():
            prompt = ids[:, : min(PROMPT, limit - new)].to(model.device)
            start = time.perf_counter()
            made = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            made.cpu()  # Waits for an accelerator.
            if round_number:  # The first warms up.
                seconds[name].append((time.perf_counter() - start) / new)
    return {name: 1 / statistics.median(values) for name, values in seconds.items()}
