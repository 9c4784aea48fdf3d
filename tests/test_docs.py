"""Everything that the documentation refers to exists, and its snippets run."""

import importlib
import re

import pytest
import torch
import typer
from datasets import Dataset
from seq2seq import SEQ2SEQ
from tiny import ROOT, make_batch, make_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import hap_transformers
from hap_transformers import ARCHITECTURES, METHODS
from hap_transformers.cli import app
from hap_transformers.components.groups import KINDS
from hap_transformers.components.releases import TRANSFORMERS_4


PAGES = sorted((ROOT / "docs").rglob("*.md"))
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


def test_the_promises_name_tests_that_exist():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`((?:\.\./)?[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 20
    for file, function in named:
        path = (ROOT / "tests" / "reliability" / file).resolve()
        assert path.is_file(), file
        assert not function or f"def {function}(" in path.read_text(), function


@pytest.mark.any_release
def test_tables_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    render_results = importlib.import_module("render_results")
    for (file, name), text in render_results.texts(render_results.grids()).items():
        assert f"<!-- {name} -->\n{text}\n<!-- end of {name} -->" in file.read_text(encoding="utf-8"), name


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "SECURITY.md", *PAGES], ids=name_of)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.fixture
def surroundings(tmp_path, monkeypatch, model_dir, request):
    """What readers have: a fine-tuned model in the working folder, data, training arguments."""
    monkeypatch.chdir(tmp_path)
    for registry in (ARCHITECTURES, KINDS, METHODS):  # Pages register entries of their own.
        entries = dict(registry)
        request.addfinalizer(lambda registry=registry, entries=entries: (registry.clear(), registry.update(entries)))
    model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = {"sentence": ["good film", "bad plot and film", "good plot", "bad film"] * 4, "label": [1, 0, 1, 0] * 4}
    data = Dataset.from_dict(rows).map(lambda row: tokenizer(row["sentence"]), remove_columns=["sentence"])
    args = TrainingArguments("out", num_train_epochs=1, use_cpu=True, report_to=[], disable_tqdm=True)
    batches = [make_batch(8, seed=seed) for seed in range(4)]
    old = make_model("bert")
    if TRANSFORMERS_4:
        old.prune_heads({0: [1, 2]})
    else:  # A checkpoint of Transformers 4 has smaller weights, and records only the heads that are gone.
        hap_transformers.prune_heads(old, {0: [1, 2]})
        del old.config.quantization_config
        for module in old.modules():
            vars(module).pop("was_cut", None)
    old.save_pretrained("pruned_by_transformers_4")
    SEQ2SEQ["bart"].model(torch.float32).save_pretrained("my-bart")
    tokenizer.save_pretrained("my-bart")
    return {
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        "model": model,
        "tokenizer": tokenizer,
        "train": data,
        "validation": data,
        "pairs": data.map(lambda row: {"labels": row["input_ids"]}, remove_columns=["label"]),
        "args": args,
        "batches": batches,
        "batch": batches[0],
    }


@pytest.mark.any_release
@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPET.search(page.read_text())], ids=name_of)
def test_snippets_run(page, surroundings):
    if page.name == "onnx.md":
        pytest.importorskip("onnxruntime")
    for snippet in SNIPPET.findall(page.read_text()):
        exec(compile(snippet, str(page), "exec"), surroundings)


@pytest.mark.any_release
def test_the_loss_of_the_own_model_is_divided_by_trainer(surroundings):
    """If `forward` took `**kwargs`, `Trainer` would expect the model to divide its loss."""
    page = ROOT / "docs" / "how_to" / "own_model.md"
    exec(SNIPPET.findall(page.read_text())[0], surroundings)
    assert not surroundings["trainer"].model_accepts_loss_kwargs


def test_the_reference_has_every_public_name():
    shown = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        shown |= set(re.findall(r"^::: hap_transformers\.([\w.]+)$", page.read_text(), re.MULTILINE))
    assert set(hap_transformers.__all__) - {"__version__"} <= shown
    for name in shown:
        found = hap_transformers
        for part in name.split("."):
            found = getattr(found, part, None) or __import__(f"hap_transformers.{part}", fromlist=[part])
        assert found.__doc__, name


def test_the_reference_has_every_command_and_flag():
    text = (ROOT / "docs" / "api" / "cli.md").read_text()
    for name, command in typer.main.get_command(app).commands.items():
        section = text.split(f"## `hap {name}`")[1].split("\n## ")[0]
        for parameter in command.params:
            assert all(flag in section for flag in parameter.opts), (name, parameter.opts)
