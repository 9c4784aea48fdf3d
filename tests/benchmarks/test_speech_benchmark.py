"""The benchmark of Whisper, on a tiny one and on noise."""

import gzip
import json
import struct
import sys
import wave

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import WhisperConfig, WhisperForConditionalGeneration

from benchmarks import speech
from benchmarks.speech import DENSE, Key, distance, table
from benchmarks.speech_data import PAUSE, RATE, Speech, read_prompts, split, windows
from benchmarks.whisper_model import END, load_whisper, read_variables
from glue_scripts.compare_glue.cells import read_cells


pytestmark = pytest.mark.any_release
VOCABULARY = 51864
SIZES = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIZES |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": VOCABULARY}


def variables_of(model):
    """The weights of a model as a file of CTranslate2 names and joins them."""
    weights = {name: value.detach().numpy() for name, value in model.model.named_parameters()}
    found = {}
    for part in ("encoder", "decoder"):
        found[f"{part}/num_heads"] = np.array(2, np.int16)
        found[f"{part}/position_encodings/encodings"] = weights[f"{part}.embed_positions.weight"]
        for kind, own in (("gamma", "weight"), ("beta", "bias")):
            found[f"{part}/layer_norm/{kind}"] = weights[f"{part}.layer_norm.{own}"]
    found["decoder/embeddings/weight"] = weights["decoder.embed_tokens.weight"]
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            found[f"encoder/{name}/{kind}"] = weights[f"encoder.{name}.{kind}"]
    for part, number in (("encoder", 0), ("decoder", 0), ("decoder", 1)):
        for name, value in block_of(weights, f"{part}.layers.{number}.").items():
            found[f"{part}/layer_{number}/{name}"] = value
    return found


def block_of(weights, layer):
    found = {}
    places = {"self_attn_layer_norm": "self_attention", "encoder_attn_layer_norm": "attention"}
    for own, place in {**places, "final_layer_norm": "ffn"}.items():
        if f"{layer}{own}.weight" in weights:
            found[f"{place}/layer_norm/gamma"] = weights[f"{layer}{own}.weight"]
            found[f"{place}/layer_norm/beta"] = weights[f"{layer}{own}.bias"]
    joined = {"self_attention/linear_0": ("self_attn", "qkv"), "self_attention/linear_1": ("self_attn", "out")}
    if f"{layer}encoder_attn.q_proj.weight" in weights:
        joined |= {f"attention/linear_{i}": ("encoder_attn", part) for i, part in enumerate(("q", "kv", "out"))}
    for place, (attention, parts) in joined.items():
        for kind in ("weight", "bias"):
            names = [f"{layer}{attention}.{part}_proj.{kind}" for part in (["out"] if parts == "out" else parts)]
            rows = [weights[name] if name in weights else np.zeros(16, np.float32) for name in names]
            found[f"{place}/{kind}"] = np.concatenate(rows)
    for i, name in enumerate(("fc1", "fc2")):
        for kind in ("weight", "bias"):
            found[f"ffn/linear_{i}/{kind}"] = weights[f"{layer}{name}.{kind}"]
    return found


def write_variables(file, variables):
    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    codes = {np.dtype(np.float32): 0, np.dtype(np.int16): 2}
    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        content += text(name) + shape + struct.pack("<BI", codes[value.dtype], value.nbytes) + value.tobytes()
    file.write_bytes(content)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(**SIZES)).eval()
    for name, parameter in model.named_parameters():
        if "embed_positions" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Files of a model, and of prompts of noise, of which one is a tone, one has no recording and one is too long."""
    folder = tmp_path_factory.mktemp("speech")
    write_variables(folder / "model.bin", variables_of(model))
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [1], "suppress_ids_begin": [2]}))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    words.save(str(folder / "tokenizer.json"))
    lines = ["; Some", "", "beep: [a tone]", "digits/one:  One.", "gone: Gone.", "hello: Hello again."]
    lines += ["bye: Good bye.", "long: Too long."]
    (folder / "texts.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "digits").mkdir()
    noise = np.random.default_rng(0).normal(0, 3000, 8000 * 12).astype(np.int16)
    for name in ("beep", "digits/one", "hello", "bye", "long"):
        with wave.open(str(folder / f"{name}.wav"), "wb") as recording:
            recording.setparams((1, 2, 8000, 0, "NONE", ""))
            recording.writeframes(noise.tobytes() * (3 if name == "long" else 1))
    return folder


def test_the_model_is_that_of_the_file(model, folder):
    found, tokenizer = load_whisper(folder)
    features, ids = torch.randn(2, 80, 3000), torch.randint(0, END, (2, 5))
    with torch.no_grad():
        logits = [each(input_features=features, decoder_input_ids=ids).logits for each in (found, model)]
    torch.testing.assert_close(*logits)
    assert tokenizer.decode([3, 4]) == "w3 w4"
    (folder / "other.bin").write_bytes(struct.pack("<I", 5))
    with pytest.raises(ValueError, match="has version 5 of the format"):
        read_variables(folder / "other.bin")


def test_prompts_and_windows(folder):
    prompts = read_prompts(folder, folder / "texts.gz")
    assert [prompt.text for prompt in prompts] == ["One.", "Hello again.", "Good bye."]
    assert all(len(prompt.samples) == 12 * RATE for prompt in prompts)
    joined = windows(prompts)
    assert [len(each.samples) for each in joined] == [int(2 * (12 + PAUSE) * RATE), int((12 + PAUSE) * RATE)]
    assert sorted(" ".join(each.text for each in joined).split()) == ["Good", "Hello", "One.", "again.", "bye."]
    assert len(windows(prompts, 5)) == 5 and len({each.text for each in windows(prompts, 9)}) > 3
    many = [Speech(np.zeros(1), str(i)) for i in range(9)]
    own, others = split(many, 1)
    assert sorted(each.text for each in own + others) == [str(i) for i in range(9)] and own != many[::2]
    with pytest.raises(FileNotFoundError, match="apt-get install"):
        read_prompts(folder, folder / "missing.gz")


def test_distance(model):
    torch.manual_seed(1)
    other = WhisperForConditionalGeneration(model.config).eval()
    labels = torch.tensor([[3, 4, 5, -100], [3, 6, 7, 8]])
    batch = {"input_features": torch.randn(2, 80, 3000), "labels": labels}
    with torch.no_grad():
        parts = [each(**batch).logits.softmax(-1)[:, 1:][labels[:, 1:] != -100] for each in (other, model)]
    found, wanted = parts
    expected = (wanted * (wanted / found).log()).sum(-1).mean().item()
    assert distance(other, model, [batch]) == pytest.approx((expected, 0.0), rel=1e-4)
    assert distance(model, model, [batch]) == pytest.approx((0.0, 1.0), abs=1e-6)


def test_cells_are_computed_once(folder, tmp_path, monkeypatch):
    output = tmp_path / "cells.jsonl"
    settings = {"model_dir": folder, "sounds_dir": folder, "transcripts": folder / "texts.gz", "output": output}
    settings |= {"ratios": 0.3, "seeds": 0, "windows": 4, "scored": 4, "num_probes": 1}
    command = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["speech", *command])
    monkeypatch.setattr(speech, "LONGEST", 6)
    speech.main()
    cells = read_cells(output, Key)
    assert set(cells) == {Key(DENSE, 0.0, 0)} | {Key(method, 0.3, 0) for method in speech.WAYS}
    assert cells[Key(DENSE, 0.0, 0)]["divergence"] == 0 < cells[Key("gradient", 0.3, 0)]["divergence"]
    assert all(cell["kept"] < 0.75 for key, cell in cells.items() if key.method != DENSE)
    monkeypatch.setattr(speech.Bench, "cell", lambda *args: pytest.fail("computed again"))
    speech.main()
    assert table(cells).count("\n") == 2 + len(speech.WAYS)
