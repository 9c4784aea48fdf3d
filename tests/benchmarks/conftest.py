"""Fixtures of the benchmarks' tests."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.embeddings_data import Encoder


@pytest.fixture
def encoder(model_dir):
    """A tiny BERT as a sentence encoder."""
    torch.manual_seed(0)
    return Encoder("tiny", AutoModel.from_pretrained(model_dir).eval(), AutoTokenizer.from_pretrained(model_dir))
