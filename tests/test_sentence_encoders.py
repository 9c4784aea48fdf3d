"""Encoders of the Sentence Transformers library: the loss is that of their whole embedding, and folders stay whole."""

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from encoders import PAIRS, TEXTS, in_a_subfolder, save_cross_encoder, save_encoder, save_t5_encoder, save_transformer
from explicit import scored_weights, sum_by_component
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Dropout, StaticEmbedding
from tiny import make_model
from transformers import AutoTokenizer

from hap_transformers import (
    PruningPlan,
    SelfLoss,
    apply_plan,
    estimate_sensitivity,
    export_remote_code,
    trim_vocabulary,
)
from hap_transformers.components.forwards import eager_copy
from hap_transformers.data.demo import demo_model_path
from hap_transformers.sentence_encoders import (
    EmbeddingLoss,
    encoder_batches,
    is_sentence_encoder,
    load_sentence_encoder,
    save_sentence_encoder,
    transformer_folder,
    transformer_of,
)


FORMS = {
    "mean": {},
    "cls": {"pooling": "cls", "normalize": False},
    "two poolings, dense": {"pooling": ("max", "weightedmean"), "dense": True, "normalize": False},
    "dense, normalized": {"dense": True},
    "prompt": {"prompts": {"query": "good film "}, "default_prompt_name": "query"},
    "prompt left out": {"prompts": {"q": "good film "}, "default_prompt_name": "q", "include_prompt": False},
}


def prune(model):
    apply_plan(model, PruningPlan.for_model(model, heads={0: [1, 3]}, neurons={0: range(24), 1: range(0, 24, 2)}))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_embedding_is_that_of_the_library(tmp_path, form):
    encoder = load_sentence_encoder(str(save_encoder(tmp_path, **form)), "cpu")
    loss, batches = EmbeddingLoss(encoder), encoder_batches(encoder, TEXTS, batch_size=7)
    with torch.no_grad():
        found = torch.cat([loss.embedding(transformer_of(encoder), batch) for batch in batches])
    torch.testing.assert_close(found, torch.from_numpy(encoder.encode(TEXTS)))
    assert set(batches[0]) <= {"input_ids", "attention_mask", "token_type_ids"}


def test_a_given_prompt_takes_the_place_of_the_default(tmp_path):
    encoder = load_sentence_encoder(str(save_encoder(tmp_path, **FORMS["prompt left out"])), "cpu")
    (batch,) = encoder_batches(encoder, TEXTS[:4], prompt="bad ")
    with torch.no_grad():
        found = EmbeddingLoss(encoder, prompt="bad ").embedding(transformer_of(encoder), batch)
    torch.testing.assert_close(found, torch.from_numpy(encoder.encode(TEXTS[:4], prompt="bad ")))


@pytest.mark.parametrize("form", ["two poolings, dense", "dense, normalized"])
def test_traces_are_those_of_the_embeddings_jacobian(tmp_path, form):
    """As for `SelfLoss`: twice the squared norms of the Jacobian, here of what the library's own forward gives."""
    encoder = load_sentence_encoder(str(save_encoder(tmp_path, **FORMS[form])), "cpu").double()
    model, count = transformer_of(encoder), 3
    (batch,) = encoder_batches(encoder, TEXTS[:count])
    features = encoder({**batch, "modality": "text"})["sentence_embedding"]
    weights = {"bert." + name: parameter for name, parameter in model.named_parameters()}
    classifier = make_model(vocab_size=40)
    weights = {name: weights[name] for name in scored_weights(classifier)}
    squares = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for value in features.flatten():
        gradients = torch.autograd.grad(value, list(weights.values()), retain_graph=True)
        for name, gradient in zip(weights, gradients, strict=True):
            squares[name] += 2 * gradient**2 / count
    heads, neurons = sum_by_component(classifier, squares)
    found = estimate_sensitivity(
        model, [batch], "gauss_newton_trace", exact_directions=100, loss_fn=EmbeddingLoss(encoder), progress=False
    ).traces
    torch.testing.assert_close(torch.stack(found["heads"]), heads, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(torch.stack(found["neurons"]), neurons, rtol=1e-6, atol=1e-12)


def test_a_mean_has_the_scores_of_the_loss_without_the_library(tmp_path):
    encoder = load_sentence_encoder(str(save_encoder(tmp_path)), "cpu")
    model, batches = transformer_of(encoder), encoder_batches(encoder, TEXTS)
    found, expected = (
        estimate_sensitivity(model, batches, loss_fn=loss, progress=False)
        for loss in (EmbeddingLoss(encoder), SelfLoss("mean", normalize=True))
    )
    torch.testing.assert_close(found.scores, expected.scores)


def test_the_loss_is_that_of_the_model_it_is_given(tmp_path):
    encoder = load_sentence_encoder(str(save_encoder(tmp_path, dense=True)), "cpu")
    model, dense = transformer_of(encoder), torch.from_numpy(encoder.encode(TEXTS[:4]))
    (batch,), loss, kept = encoder_batches(encoder, TEXTS[:4]), EmbeddingLoss(encoder), eager_copy(model)
    prune(model)
    with torch.no_grad():
        torch.testing.assert_close(loss.embedding(kept, batch), dense)
        assert (loss.embedding(model, batch) - dense).abs().max() > 0.01


def test_dropout_of_other_modules_is_off_while_scoring(tmp_path):
    encoder = load_sentence_encoder(str(save_encoder(tmp_path)), "cpu")
    encoder.append(Dropout(0.5))
    encoder.train()
    (batch,), loss, model = encoder_batches(encoder, TEXTS[:4]), EmbeddingLoss(encoder), transformer_of(encoder).eval()
    first, second = (loss.embedding(model, batch) for _ in range(2))
    assert torch.equal(first, second) and encoder[-1].training


# ---- saved folders


# All are forked from a process that has imported the libraries, which takes most of the time, and no more.
LOAD = """
import json, multiprocessing, sys
import sentence_transformers, torch, transformers.trainer

def load(how, given):
    if how == "without":
        sys.modules["hap_transformers"] = None
    else:
        import hap_transformers
    for kind, folder, inputs in given:
        model = getattr(sentence_transformers, kind)(folder, device="cpu", trust_remote_code=how == "without")
        run = model.encode if kind == "SentenceTransformer" else model.predict
        torch.save(torch.from_numpy(run([tuple(x) if isinstance(x, list) else x for x in inputs])), folder + ".pt")

assert "hap_transformers" not in sys.modules
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    pool.starmap(load, json.load(sys.stdin).items(), chunksize=1)
"""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Folders of pruned encoders and rerankers: class, source, folder, inputs and outputs before they were saved."""
    root, made = tmp_path_factory.mktemp("pruned"), []
    for name in ("new", "subfolder", "library", "t5", "reranker"):
        here = root / name
        here.mkdir()
        kind, texts = ("CrossEncoder", PAIRS) if name == "reranker" else ("SentenceTransformer", TEXTS)
        if name == "reranker":
            source = save_cross_encoder(here)
        else:
            source = save_t5_encoder(here) if name == "t5" else save_encoder(here, dense=True)
        (source / "notes.txt").write_text("kept")
        (source / "onnx").mkdir()
        (source / "onnx" / "model.onnx").write_text("of the dense model")
        source = in_a_subfolder(source) if name == "subfolder" else source
        model, folder = load_sentence_encoder(str(source), "cpu"), str(here / "pruned")
        prune(transformer_of(model))
        if name == "library":
            model.save_pretrained(folder)
        else:
            save_sentence_encoder(model, str(source), folder)
        outputs = model.predict(texts) if name == "reranker" else model.encode(texts)
        made.append((kind, source, folder, texts, torch.from_numpy(outputs)))
    return made


@pytest.fixture(scope="module")
def in_other_processes(pruned, tmp_path_factory):
    """Outputs of the folders in a process with this package, and of exported ones in a process without it."""
    root, given = tmp_path_factory.mktemp("exported"), {"with": [], "without": []}
    for i, (kind, _, folder, texts, _) in enumerate(pruned):
        given["with"].append((kind, folder, texts))
        if "/t5/" in folder:
            continue
        shutil.copytree(folder, root / str(i))
        export_remote_code(root / str(i))
        given["without"].append((kind, str(root / str(i)), texts))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, "-P", "-c", LOAD]
    subprocess.run(command, input=json.dumps(given), text=True, check=True, env=environment, timeout=300)
    return {how: [torch.load(folder + ".pt") for _, folder, _ in folders] for how, folders in given.items()}


@pytest.mark.slow
def test_other_processes_load_what_was_saved(pruned, in_other_processes):
    for (*_, expected), found in zip(pruned, in_other_processes["with"], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.slow
def test_without_this_package_exported_code_loads_them(pruned, in_other_processes):
    others = [outputs for *_, folder, _, outputs in pruned if "/t5/" not in folder]
    for expected, found in zip(others, in_other_processes["without"], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", ["new", "subfolder"])
def test_a_trimmed_vocabulary_is_saved_with_the_encoder(tmp_path, layout):
    """The tokenizer's files are those of the smaller vocabulary, all others those of the source."""
    source = save_encoder(tmp_path, dense=True)
    source = in_a_subfolder(source) if layout == "subfolder" else source
    encoder, folder = load_sentence_encoder(str(source), "cpu"), tmp_path / "trimmed"
    rows = transformer_of(encoder).config.vocab_size
    expected = encoder.encode(TEXTS)
    trim_vocabulary(transformer_of(encoder), encoder.tokenizer, TEXTS)
    save_sentence_encoder(encoder, str(source), folder)
    again = SentenceTransformer(str(folder), device="cpu")
    assert (again.encode(TEXTS) == expected).all() and (encoder.encode(TEXTS) == expected).all()
    assert len(again.tokenizer) == transformer_of(again).config.vocab_size < rows
    if (vocabulary := folder / transformer_folder(source) / "vocab.txt").exists():
        assert len(vocabulary.read_text().splitlines()) == len(again.tokenizer)


def test_the_library_would_not_use_exported_code_of_a_t5(pruned):
    (folder,) = (Path(folder) for *_, folder, _, _ in pruned if "/t5/" in folder)
    before = contents(folder)
    with pytest.raises(ValueError, match="loads the encoder of a T5 by its class.*after `import hap_transformers`"):
        export_remote_code(folder)
    assert contents(folder) == before


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_other_files_are_kept(pruned):
    for _, source, folder, *_ in pruned:
        if "library" in folder:
            continue
        place = transformer_folder(source)
        changed = {os.path.join(place, file) for file in ("config.json", "model.safetensors")}
        before, after = contents(source), contents(source.parent / "pruned")
        before = {file: content for file, content in before.items() if "onnx" not in file}
        assert {
            file for file in before if before[file] != after.get(file)
        } == changed and after.keys() == before.keys()
        assert "notes.txt" in "".join(after)


def test_files_of_a_model_on_the_hub_are_those_of_its_snapshot(tmp_path, monkeypatch):
    source, asked = save_encoder(tmp_path, dense=True), []
    encoder = load_sentence_encoder(str(source), "cpu")

    def snapshot_download(name, ignore_patterns):
        asked.append(name)
        assert not [p for p in ignore_patterns if fnmatch("2_Dense/model.safetensors", p) or fnmatch("vocab.txt", p)]
        assert all(any(fnmatch(f, p) for p in ignore_patterns) for f in ("model.safetensors", "onnx/model.onnx"))
        return str(source)

    monkeypatch.setattr("hap_transformers.sentence_encoders.snapshot_download", snapshot_download)
    save_sentence_encoder(encoder, "me/encoder", tmp_path / "small")
    assert asked == ["me/encoder"] and contents(tmp_path / "small").keys() == contents(source).keys()


def test_a_folder_inside_the_source_is_not_copied_into_itself(tmp_path):
    source = save_encoder(tmp_path)
    encoder = load_sentence_encoder(str(source), "cpu")
    save_sentence_encoder(encoder, str(source), source / "small" / "deep")
    assert not (source / "small" / "deep" / "small").exists()
    assert (
        SentenceTransformer(str(source / "small" / "deep"), device="cpu").encode(TEXTS) == encoder.encode(TEXTS)
    ).all()


# ---- what cannot be pruned


def test_only_folders_of_the_library_are_recognized(tmp_path):
    assert is_sentence_encoder(str(save_encoder(tmp_path)))
    assert not is_sentence_encoder(str(tmp_path / "transformer"))
    assert not is_sentence_encoder("./nowhere") and not is_sentence_encoder("no/such-model")


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    source = save_encoder(tmp_path)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    message = r"'.*encoder' has a modules.json: .* pip install 'hap_transformers\[sentence-transformers\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        load_sentence_encoder(str(source))


def test_other_models_of_the_library_are_named(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_transformer(tmp_path))
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    static.save_pretrained(str(tmp_path / "static"))
    with pytest.raises(ValueError, match="first module is a StaticEmbedding, not a transformer"):
        load_sentence_encoder(str(tmp_path / "static"), "cpu")
    source = save_encoder(tmp_path)
    config = json.loads((source / "config_sentence_transformers.json").read_text())
    config["model_type"] = SparseEncoder.__name__
    (source / "config_sentence_transformers.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a SparseEncoder; .* only SentenceTransformer and CrossEncoder can be"):
        load_sentence_encoder(str(source), "cpu")


def test_spoiled_folders_are_named(tmp_path):
    source = save_encoder(tmp_path)
    (source / "model.safetensors").write_bytes(b"\x07\x00spoiled")
    with pytest.raises(ValueError, match="'.*encoder' cannot be loaded as a SentenceTransformer: "):
        load_sentence_encoder(str(source), "cpu")


def test_a_reranker_is_a_classifier(tmp_path):
    source = save_cross_encoder(tmp_path)
    reranker = load_sentence_encoder(str(source), "cpu")
    (batch,) = encoder_batches(reranker, PAIRS[:5])
    with torch.no_grad():
        logits = transformer_of(reranker)(**batch).logits[:, 0]
    torch.testing.assert_close(logits.sigmoid(), torch.from_numpy(CrossEncoder(str(source)).predict(PAIRS[:5])))
    assert not batch["token_type_ids"].eq(0).all()


def test_the_demos_encoder():
    """A real model, saved by a release of 2021."""
    encoder = load_sentence_encoder(demo_model_path(), "cpu")
    texts = ["A man is playing a guitar.", "Nobody likes this film at all, and rightly so."]
    (batch,) = encoder_batches(encoder, texts)
    with torch.no_grad():
        found = EmbeddingLoss(encoder).embedding(transformer_of(encoder), batch)
    torch.testing.assert_close(found, torch.from_numpy(encoder.encode(texts)))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
