"""Tiny models and batches that tests share."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from zoo import VOCABULARY, ZOO, Tiny

from hap_transformers import PruningPlan, Sensitivity
from hap_transformers.components.groups import find_groups


ROOT = Path(__file__).parents[1]
GLUE = ROOT.parent / "shared" / "glue"
# CI sets HAP_REQUIRE_GLUE, so missing data fails there instead of skipping tests.
needs_glue = pytest.mark.skipif(
    not GLUE.is_dir() and not os.environ.get("HAP_REQUIRE_GLUE"), reason="GLUE parquet files are not in ../shared/glue"
)
CIFAR10 = ROOT.parent / "shared" / "cifar10"
needs_cifar10 = pytest.mark.skipif(
    not CIFAR10.is_dir() and not os.environ.get("HAP_REQUIRE_GLUE"), reason="CIFAR-10 is not in ../shared/cifar10"
)
# `make test-reliability` sets HAP_LONG for more repetitions.
LONG = bool(os.environ.get("HAP_LONG"))

# Models whose scores are compared with explicit derivatives.
SCORED_MODELS = ["bert", "distilbert", "electra", "gpt2", "roberta"]
# The two views of what attention consists of.
WHOLE_HEADS = ["heads", "neurons"]
DIMENSIONS = ["query_key_dims", "value_dims", "neurons"]
# Methods whose scores are changes of the loss, for heads and neurons alike.
COMPARABLE = ("kronecker", "gauss_newton_trace", "hessian_trace", "fisher")


def make_model(model_type: str = "bert", dtype: torch.dtype = torch.float64, num_labels: int = 2, **sizes):
    """A tiny model with weights large enough that every head matters."""
    return ZOO[model_type].model(dtype, num_labels=num_labels, **sizes)


def make_batch(size: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with padding and both classes."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = torch.ones(size, length, dtype=torch.long)
    attention_mask[1:2, length - 3 :] = 0
    return {
        "input_ids": torch.randint(3, VOCABULARY, (size, length), generator=generator),
        "attention_mask": attention_mask,
        "labels": torch.arange(size) % 2,
    }


def make_batches(tiny: Tiny, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Batches of an architecture, with enough tokens to tell features apart."""
    batches = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        batch = tiny.batch(8)
        if tiny.inputs == "text":
            tokens = torch.randint(3, VOCABULARY, batch["input_ids"].shape, generator=generator)
            batch["input_ids"] = torch.where(batch["input_ids"] > 2, tokens, batch["input_ids"])
        else:
            batch = {k: torch.randn(v.shape, dtype=v.dtype, generator=generator) for k, v in batch.items()}
        batches.append(batch)
    return batches


def untouched(model, before) -> bool:
    """Whether a model has the weights of a `state_dict` and no record of pruning."""
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()) and not getattr(
        model.config, "pruned_heads", None
    )


def hand_made(method: str, **scores: list[torch.Tensor] | None) -> Sensitivity:
    """Scores by hand, with the flags of a method."""
    scores = {kind: layers for kind, layers in scores.items() if layers is not None}
    foresees_refit = method == "kronecker"
    return Sensitivity(method, scores, comparable=method in COMPARABLE, foresees_refit=foresees_refit)


def random_scores(model, method: str = "kronecker", seed: int = 0) -> Sensitivity:
    """Random scores of all heads and neurons of a model."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        kind: [
            torch.rand(group.num_components, generator=generator, dtype=torch.float64)
            for group in find_groups(model, [kind])
        ]
        for kind in ("heads", "neurons")
    }
    return hand_made(method, **scores)


def changed_plan(plan: PruningPlan, removed=None, original=None, **fields) -> PruningPlan:
    """A copy of a plan with other removals of some kinds, or other fields."""
    removed, original = {**plan.removed, **(removed or {})}, {**plan.original, **(original or {})}
    return dataclasses.replace(plan, removed=removed, original=original, **fields)
