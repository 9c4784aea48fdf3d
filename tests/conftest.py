"""Tiny models and batches that tests share."""

import json
import os
import sys
from pathlib import Path

import pytest


if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # Workers share the cores, and so do the processes that tests start.

import torch
from accelerate.state import AcceleratorState
from zoo import VOCABULARY, ZOO

import hap_transformers  # noqa: F401


ROOT = Path(__file__).parents[1]
GLUE = ROOT.parent / "shared" / "glue"
# CI sets HAP_REQUIRE_GLUE, so that missing data fails there instead of skipping.
needs_glue = pytest.mark.skipif(
    not GLUE.is_dir() and not os.environ.get("HAP_REQUIRE_GLUE"), reason="GLUE parquet files are not in ../shared/glue"
)
sys.path.insert(0, str(ROOT / "glue_scripts"))
# `make test-reliability` sets it: tests that repeat something repeat it more often.
LONG = bool(os.environ.get("HAP_LONG"))

# Models whose scores are held against explicit derivatives.
SCORED_MODELS = ["bert", "distilbert", "electra", "gpt2", "roberta"]


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


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """Accelerate keeps the precision in a singleton, Transformers 4 in the environment: tests would inherit it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=sorted(ZOO))
def model_type(request) -> str:
    return request.param


@pytest.fixture(params=SCORED_MODELS)
def scored_model_type(request) -> str:
    return request.param


@pytest.fixture
def tell():
    """Keeps figures for docs/reliability.md; short forms have none worth telling."""

    def keep(**figures):
        file = ROOT / "docs" / "results" / "reliability.json"
        if LONG:
            known = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps({**known, **figures}, indent=2) + "\n")

    return keep


def untouched(model, before) -> bool:
    """Whether a model has the weights of a `state_dict` and no record of pruning."""
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()) and not getattr(
        model.config, "pruned_heads", None
    )


def pytest_collection_modifyitems(items):
    """Tests of the promises in docs/reliability.md have a command of their own."""
    for item in items:
        if "reliability" in item.path.parts:
            item.add_marker(pytest.mark.reliability)
