"""Perplexity for a trainer, without keeping any logits."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from hap_transformers.data.task_metrics import CONFIDENCE, RESAMPLES


def block_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of every block of tokens; what to give a trainer as `preprocess_logits_for_metrics`.

    Args:
        logits (`torch.Tensor`): Shape `(blocks, tokens, vocabulary)`; some models return more than them.
        labels (`torch.Tensor`): The blocks, shape `(blocks, tokens)`.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    # Block by block: the float32 logits of one are large enough.
    return torch.stack([F.cross_entropy(z[:-1].float(), y[1:]) for z, y in zip(logits, labels, strict=True)])


class Perplexity:
    """What to give a trainer as `compute_metrics` beside [`block_losses`]: blocks have one length, so all count alike.

    Example:
        >>> metric = Perplexity()
        >>> metric(EvalPrediction(np.log([2.0, 8.0]), None))
        {'perplexity': 4.0}
    """

    def __init__(self):
        self._last = np.empty(0)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Computes the perplexity of an evaluation."""
        self._last = np.asarray(prediction.predictions, dtype=np.float64)
        return {"perplexity": float(np.exp(self._last.mean()))}

    def intervals(self, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, list[float]]:
        """Bootstraps the last perplexity over blocks: the ends of its 95 % interval."""
        if len(self._last) < 2:
            return {}
        drawn = np.random.default_rng(seed).integers(len(self._last), size=(resamples, len(self._last)))
        ends = np.quantile(self._last[drawn].mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return {"perplexity": [float(end) for end in np.exp(ends)]}
