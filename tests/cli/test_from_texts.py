"""Models are scored, planned, pruned and refitted on the command line from texts without labels."""

import json

import pytest
import torch
from script_inputs import ROWS, save_model
from seq2seq import SEQ2SEQ
from tiny import make_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMultipleChoice,
    BertModel,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner
from zoo import ZOO

from hap_transformers import SelfLoss, Sensitivity, estimate_sensitivity
from hap_transformers.cli import app


def hap(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def here(tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path))
    classifier = make_model(vocab_size=40, dtype=torch.float32)
    for name, model in (("classifier", classifier), ("encoder", classifier.bert)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = list(dict.fromkeys(text for text, _ in ROWS))
    texts = [f"{text} {i}" for i in range(-(-12 // len(texts))) for text in texts][:12]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, auto", [("classifier", AutoModelForSequenceClassification), ("encoder", AutoModel)])
def test_from_texts_to_a_smaller_model(here, name, auto):
    scored = json.loads(hap("score", name, "--texts", "texts.txt", "--batch", 12, "--json"))
    assert scored["examples"] == 12
    hap("plan", "sensitivity.safetensors", "--ratio", 0.5)
    arguments = ("--plan", "plan.json", "--texts", "texts.txt", "--output", "small", "--json")
    pruned = json.loads(hap("prune", name, *arguments))
    assert pruned["refitted"] and pruned["parameters"]["pruned"] < pruned["parameters"]["dense"]
    small = auto.from_pretrained("small")
    assert sum(p.numel() for p in small.parameters()) == pruned["parameters"]["pruned"]
    # The scores are those of the function, on all texts at once.
    tokenizer, model = AutoTokenizer.from_pretrained(name), auto.from_pretrained(name)
    batch = dict(tokenizer((here / "texts.txt").read_text().splitlines(), padding=True, return_tensors="pt"))
    expected, found = estimate_sensitivity(model, [batch], progress=False), Sensitivity.load("sensitivity.safetensors")
    torch.testing.assert_close(found.heads, expected.heads, rtol=1e-3, atol=1e-9)


def test_pooling_is_chosen(here):
    """Scores are those of `SelfLoss` with the same choice, and the cosine is that of these embeddings."""
    hap("score", "encoder", "--texts", "texts.txt", "--batch", 12, "--pooling", "cls", "--no-normalize")
    tokenizer, model = AutoTokenizer.from_pretrained("encoder"), AutoModel.from_pretrained("encoder")
    batch = dict(tokenizer((here / "texts.txt").read_text().splitlines(), padding=True, return_tensors="pt"))
    expected = estimate_sensitivity(model, [batch], loss_fn=SelfLoss("cls", False), progress=False)
    found = Sensitivity.load("sensitivity.safetensors")
    largest = max(float(scores.max()) for scores in expected.heads)  # Float32 rounds small costs by shares of it.
    torch.testing.assert_close(found.heads, expected.heads, rtol=0, atol=1e-3 * largest)
    arguments = ("--texts", "texts.txt", "--ratio", 0.5, "--pooling", "cls", "--output", "small", "--json")
    assert 0.5 < json.loads(hap("prune", "encoder", *arguments))["fidelity"]["cosine"] < 1 + 1e-6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("encoder", ("--pooling", "max"), "Unknown pooling 'max'"),
        ("classifier", ("--pooling", "cls"), "which has a head"),
        ("classifier", ("--no-normalize",), "which has a head"),
    ],
)
def test_pooling_that_cannot_be_chosen_is_named(here, name, options, message):
    result = CliRunner().invoke(app, ["score", name, "--texts", "texts.txt", *options])
    assert message in str(result.exception) and not (here / "sensitivity.safetensors").exists()


def test_a_model_of_several_texts_at_once_is_refused(here):
    BertForMultipleChoice(make_model(vocab_size=40).config).save_pretrained("choice")
    result = CliRunner().invoke(app, ["score", "choice", "--texts", "texts.txt"])
    assert "'choice' is a BertForMultipleChoice, which reads several texts for one answer" in str(result.exception)


def test_a_model_of_images_is_refused(here):
    ZOO["vit"].model(torch.float32).save_pretrained("vit")
    result = CliRunner().invoke(app, ["score", "vit", "--texts", "texts.txt"])
    assert "reads 'pixel_values', not texts" in str(result.exception)


@pytest.mark.parametrize("command", ["align", "score", "prune"])
def test_a_model_that_needs_something_to_decode_is_refused_before_it_runs(here, command, monkeypatch):
    SEQ2SEQ["t5"].model(torch.float32).save_pretrained("t5")
    AutoTokenizer.from_pretrained("classifier").save_pretrained("t5")
    monkeypatch.setattr(T5ForConditionalGeneration, "forward", lambda *args, **kwargs: pytest.fail("The model ran."))
    ratio = ("--ratio", "0.5") if command == "prune" else ()
    result = CliRunner().invoke(app, [command, "t5", "--texts", "texts.txt", "--output", "small", *ratio])
    message = str(result.exception)
    assert "'t5' is a T5ForConditionalGeneration, which needs something to decode" in message
    assert "HapTrainer" in message and "docs/how_to/seq2seq.md" in message and not (here / "small").exists()


def test_such_a_model_is_pruned_without_data(here):
    SEQ2SEQ["t5"].model(torch.float32).save_pretrained("t5")
    arguments = ("--method", "magnitude", "--ratio", 0.5, "--output", "small", "--json")
    pruned = json.loads(hap("prune", "t5", *arguments))
    assert pruned["parameters"]["pruned"] < pruned["parameters"]["dense"] and not pruned["refitted"]


def test_an_encoder_saved_by_itself_is_one(here):
    assert isinstance(AutoModel.from_pretrained("encoder"), BertModel)
