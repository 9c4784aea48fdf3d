"""Pruned models must come back from plain `from_pretrained`, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import HEADS, make_batch, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification


RELOAD = """
import sys, torch, hap_transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
folder, dtype = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype))
assert not model.training and not getattr(model, "is_quantized", False)
save_file({"logits": model(**load_file(folder + "/inputs")).logits}, folder + "/reloaded")
"""


def reload_elsewhere(folder, inputs, dtype):
    save_file(inputs, folder / "inputs")
    command = [sys.executable, "-c", RELOAD, str(folder), str(dtype).removeprefix("torch.")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return load_file(folder / "reloaded")["logits"]


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_in_a_new_process(tmp_path, model_type, dtype):
    model, inputs = make_model(model_type, torch.float32), inputs_of(make_batch())
    model.prune_heads({0: [1], 1: range(HEADS)})
    model.prune_heads({0: [3]})
    model.save_pretrained(tmp_path)
    expected = model.to(dtype)(**inputs).logits
    assert torch.equal(reload_elsewhere(tmp_path, inputs, dtype), expected)


def test_prune_save_reload_prune_save_reload(tmp_path, model_type):
    model, inputs = make_model(model_type, torch.float32), inputs_of(make_batch())
    model.prune_heads({0: [1]})
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    again.prune_heads({0: [1, 0], 1: [2]})
    model.prune_heads({0: [0], 1: [2]})
    again.save_pretrained(tmp_path / "second")
    last = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert last.config.pruned_heads == {0: [0, 1], 1: [2]}
    assert torch.equal(last(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForTokenClassification])
def test_loads_under_another_head(tmp_path, model_type, auto_class):
    model, inputs = make_model(model_type, torch.float32), inputs_of(make_batch())
    model.prune_heads({0: [1, 2]})
    model.save_pretrained(tmp_path)
    other = auto_class.from_pretrained(tmp_path)
    expected = model.base_model(**inputs).last_hidden_state
    assert torch.equal(other.base_model(**inputs).last_hidden_state, expected)


def test_the_reloaded_model_is_ordinary(tmp_path):
    """No trace of the loader: it may be cast, and its config is plain JSON."""
    model = make_model(dtype=torch.float32)
    model.prune_heads({0: [1]})
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not hasattr(again, "hf_quantizer") or again.hf_quantizer is None
    again.double()
    assert json.loads(again.config.to_json_string())["quantization_config"]["heads"] == {"0": HEADS - 1}


def test_dense_models_are_not_marked(tmp_path):
    model = make_model(dtype=torch.float32)
    model.prune_heads({})
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


QUERY = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s["linears"].update({"encoder.layer.9.attention.self.query": [16, 4]}), "no such Linear"),
        (lambda s: s["linears"].update({"embeddings.word_embeddings": [16, 4]}), "no such Linear"),
        (lambda s: s["linears"].update({QUERY: [16, 10**12]}), "expected at most"),
        (lambda s: s["linears"].update({QUERY: [16, -4]}), "expected at most"),
        (lambda s: s["linears"].update({QUERY: [16, "4"]}), "expected at most"),
        (lambda s: s["linears"].update({QUERY: [16]}), "expected at most"),
        (lambda s: s["linears"].update({QUERY: [16, 8]}), "would fit"),
        (lambda s: s["heads"].update({"0": 2}), "pruned_heads names"),
        (lambda s: s["heads"].update({"7": 2}), "names layer 7"),
    ],
)
def test_a_config_edited_by_hand_is_refused(tmp_path, change, message):
    model = make_model(dtype=torch.float32)
    model.prune_heads({0: [1]})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
