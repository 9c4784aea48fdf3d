"""What embeddings are worth: similarity as people see it, distance to the dense model's, and retrieval."""

import torch
from scipy.stats import spearmanr

from .embeddings_data import HeldOut


def measure(embeddings: torch.Tensor, dense: torch.Tensor, held_out: HeldOut) -> dict[str, float]:
    """Computes all figures of an encoder.

    Args:
        embeddings (`torch.Tensor`): Its embeddings of the held-out sentences, `(sentences, features)`, of norm 1.
        dense (`torch.Tensor`): Those of the dense model, of the same shape.
        held_out (`HeldOut`): What the sentences are.

    Returns:
        `dict[str, float]`: `spearman`, the rank correlation of cosines with ratings on STS-B; by task, `cosine_*`, the
            mean cosine to the dense embedding, and `mrr_*`, the mean reciprocal rank of a sentence's partner.
    """
    figures = {"spearman": rank_correlation(embeddings, held_out.rated, held_out.ratings)}
    cosines = (embeddings * dense).sum(1)
    figures |= {f"cosine_{task}": float(cosines[places].mean()) for task, places in held_out.unseen.items()}
    for task, pairs in held_out.partners.items():
        figures[f"mrr_{task}"] = reciprocal_rank(embeddings, pairs, held_out.candidates[task])
    return {name: round(value, 5) for name, value in figures.items()}


def rank_correlation(embeddings: torch.Tensor, pairs: torch.Tensor, ratings: torch.Tensor) -> float:
    """Spearman's correlation of the cosines of pairs with their ratings."""
    cosines = (embeddings[pairs[:, 0]] * embeddings[pairs[:, 1]]).sum(1)
    return float(spearmanr(cosines, ratings).statistic)


def reciprocal_rank(embeddings: torch.Tensor, pairs: torch.Tensor, candidates: torch.Tensor) -> float:
    """The mean of 1 / rank of each first sentence's partner among all candidates, the most similar one first.

    Args:
        embeddings (`torch.Tensor`): Shape `(sentences, features)`.
        pairs (`torch.Tensor`): Positions of the sentences of each pair, shape `(pairs, 2)`.
        candidates (`torch.Tensor`): Positions of the candidates, each once, shape `(candidates,)`.
    """
    cosines = embeddings[pairs[:, 0]] @ embeddings[candidates].T
    partner = candidates == pairs[:, 1:]
    # A sentence must not stand in the way of its own partner.
    cosines = cosines.masked_fill((candidates == pairs[:, :1]) & ~partner, -torch.inf)
    return float((1 / (1 + (cosines > cosines[partner][:, None]).sum(1))).mean())
