"""Fixtures of all tests. `conftest.py` loads them where tests run."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from convnets import QUICK
from matplotlib.figure import Figure
from own_convnet import NETS, own_entry
from script_inputs import save_model
from tiny import LONG, ROOT, SCORED_MODELS
from transformers import AutoModel, AutoTokenizer
from zoo import ZOO

from benchmarks.embeddings_data import Encoder


@pytest.fixture(autouse=True)
def fresh_settings():
    """Resets what TrainingArguments set for Accelerate: a singleton, and variables that other processes inherit."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ, ACCELERATE_MIXED_PRECISION="no"):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def drawn():
    """For tests that look at pictures."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Pictures are composed but not drawn, which takes longer than all else that is done with a tiny model."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda self, path, **settings: Path(path).write_text("not drawn"))


@pytest.fixture(scope="module")
def known_convnet():
    """Lets the package know the tests' own convolutional model."""
    with own_entry():
        yield


@pytest.fixture(scope="module", params=[*QUICK, "own"])
def net(request, known_convnet):
    """A tiny convolutional network."""
    return NETS[request.param]


@pytest.fixture(params=sorted(ZOO))
def model_type(request) -> str:
    return request.param


@pytest.fixture(params=SCORED_MODELS)
def scored_model_type(request) -> str:
    return request.param


@pytest.fixture
def model_dir(tmp_path):
    """The folder of a tiny BERT with a tokenizer."""
    return save_model(tmp_path)


@pytest.fixture
def encoder(model_dir):
    """A tiny BERT as the benchmarks' sentence encoder."""
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(model_dir).eval()
    return Encoder("tiny", model, AutoTokenizer.from_pretrained(model_dir))


@pytest.fixture
def tell():
    """Writes figures for docs/reliability.md. Short runs write none."""

    def keep(**figures):
        file = ROOT / "docs" / "results" / "reliability.json"
        if LONG:
            known = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps({**known, **figures}, indent=2) + "\n")

    return keep
