"""The benchmark of language models, on a tiny one."""

import math
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import language
from benchmarks.flap import FLAP
from benchmarks.language import DENSE, FILLED, NOTHING_REMOVED, Key
from benchmarks.language_data import predicted
from benchmarks.language_table import comparison, table
from glue_scripts.compare_glue.cells import read_cells
from hap_transformers import METHODS
from language_scripts.demo_model import demo_tokenizer


pytestmark = pytest.mark.any_release
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=300)).eval()
    for parameter in model.model.layers.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_cells_are_computed_once(tmp_path, model, monkeypatch):
    monkeypatch.setitem(METHODS, "flap", FLAP)  # Other tests see it no more.
    text = " ".join(f"the river {i % 7} runs {i % 11} slower" for i in range(400))
    (tmp_path / "test.txt").write_text(text)
    (tmp_path / "validation.txt").write_text(text.replace("river 3", "<unk> 3"))
    model.save_pretrained(tmp_path / "model")
    demo_tokenizer(text).save_pretrained(tmp_path / "model")
    output = tmp_path / "cells.jsonl"
    command = ["language", "--model", str(tmp_path / "model"), "--text_dir", str(tmp_path), "--output", str(output)]
    settings = {"cache": tmp_path / "cache", "ratios": 0.4, "tokens": 1024, "score_tokens": 512, "num_probes": 1}
    settings |= {"test_windows": 2, "recovery_tokens": 1024}
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", command)
    language.main()
    cells = read_cells(output, Key)
    assert set(cells) == {NOTHING_REMOVED, Key("kronecker", 0.4, 0, FILLED)} | {
        *(Key(method, 0.4, 1024, FILLED) for method in language.WAYS),
        *(Key(method, 0.4, 1024, FILLED, recovery_tokens=1024) for method in language.RECOVERED),
    }
    assert cells[NOTHING_REMOVED]["agreement"] == 1 > cells[Key("magnitude", 0.4, 1024, FILLED)]["agreement"]
    assert all(cell["kept"] < 0.7 for key, cell in cells.items() if key.method != DENSE)
    monkeypatch.setattr(language.Bench, "cell", lambda *args: pytest.fail("computed again"))
    language.main()
    assert table(cells).count("\n") == 2 + 1 + len(language.WAYS) + len(language.RECOVERED)
    assert comparison(cells).count("\n") == 1 + len(language.WAYS) + len(language.RECOVERED)
    assert all(f"| {method} on 1,024 tokens | " in comparison(cells) for method in language.RECOVERED)


def test_perplexity(model):
    ids = torch.arange(60).view(3, 20)
    loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    perplexity, choices = predicted(model, ids)
    assert perplexity == pytest.approx(math.exp(loss.item()), rel=1e-4)
    following = model.generate(ids[:1, :12], max_new_tokens=1, do_sample=False)[0, -1]
    assert choices.shape == (3, 19) and choices[0, 11] == following
