"""Tiny models and batches that tests share."""

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import hap_transformers  # noqa: F401


ROOT = Path(__file__).parents[1]
GLUE = ROOT.parent / "shared" / "glue"
# CI sets HAP_REQUIRE_GLUE, so that missing data fails there instead of skipping.
needs_glue = pytest.mark.skipif(
    not GLUE.is_dir() and not os.environ.get("HAP_REQUIRE_GLUE"), reason="GLUE parquet files are not in ../shared/glue"
)
sys.path.insert(0, str(ROOT / "glue_scripts"))

LAYERS, HEADS, HIDDEN, VOCABULARY = 2, 4, 16, 40
SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
BERT_SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 24,
    **SIZES,
}
DISTIL_SIZES = {"dim": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "hidden_dim": 24, **SIZES}
MODELS = {
    "bert": (BertConfig, BertForSequenceClassification, BERT_SIZES),
    "roberta": (RobertaConfig, RobertaForSequenceClassification, BERT_SIZES),
    "electra": (ElectraConfig, ElectraForSequenceClassification, {**BERT_SIZES, "embedding_size": 8}),
    "distilbert": (DistilBertConfig, DistilBertForSequenceClassification, DISTIL_SIZES),
}
# Models that can be scored; those above can be pruned too.
GPT2_SIZES = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "n_inner": 24, "n_positions": 32}
SCORED_MODELS = {
    **MODELS,
    "gpt2": (GPT2Config, GPT2ForSequenceClassification, {**GPT2_SIZES, "vocab_size": VOCABULARY, "pad_token_id": 0}),
}

# Each model's output projection of a layer.
OUTPUTS = {
    "bert": "bert.encoder.layer.{}.attention.output.dense",
    "roberta": "roberta.encoder.layer.{}.attention.output.dense",
    "electra": "electra.encoder.layer.{}.attention.output.dense",
    "distilbert": "distilbert.transformer.layer.{}.attention.out_lin",
    "gpt2": "transformer.h.{}.attn.c_proj",
}


def make_model(model_type: str = "bert", dtype: torch.dtype = torch.float64, num_labels: int = 2, **sizes):
    """A tiny model with weights large enough that every head matters."""
    torch.manual_seed(0)
    config_class, model_class, defaults = SCORED_MODELS[model_type]
    model = model_class(config_class(**{**defaults, **sizes}, num_labels=num_labels)).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


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


@pytest.fixture(params=sorted(MODELS))
def model_type(request) -> str:
    return request.param


@pytest.fixture(params=sorted(SCORED_MODELS))
def scored_model_type(request) -> str:
    return request.param
