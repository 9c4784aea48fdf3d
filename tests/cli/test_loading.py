"""Texts of any length, files in other encodings and tokenizers without padding, on the way into a command."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from script_inputs import ROWS, WORDS, save_model, write_csv
from tiny import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hap_transformers import PruningPlan, Sensitivity
from hap_transformers.cli import app
from hap_transformers.data.tokenizers import positions
from hap_transformers.efficiency import count_flops, example_inputs


@pytest.fixture
def short(tmp_path):
    """A model with fewer than 128 positions."""
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path))
    folder = tmp_path / "short"
    model = make_model(vocab_size=40, dtype=torch.float32, max_position_embeddings=14)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_short_models_have_a_shorter_default(tmp_path, short):
    folder, model = short
    result = run("info", folder, "--json")
    note = "hap: BertForSequenceClassification takes at most 14 tokens; --length is 14, not 128."
    assert result.stderr.splitlines() == [note]
    assert json.loads(result.stdout)["flops"] == count_flops(model, example_inputs(model, 1, 14))
    assert "for 1 x 14 tokens" in run("info", folder).stdout
    longer = make_model(vocab_size=40, dtype=torch.float32)
    longer.save_pretrained(tmp_path / "longer")
    for pair in ([folder, tmp_path / "longer"], [tmp_path / "longer", folder]):
        assert run("bench", *pair, "--repeats", "1").stdout.startswith("8 x 14 tokens")
    assert run("score", folder, "--method", "magnitude", "--output", tmp_path / "scores").exit_code == 0
    command = ["plan", tmp_path / "scores", "--ratio", "0.3", "--output", tmp_path / "plan.json"]
    assert note in run(*command, "--budget", "flops").stderr
    assert note not in run(*command).stderr  # Parameters have no length.


@pytest.mark.parametrize("command", ["info", "bench", "plan"])
def test_lengths_that_were_asked_for_are_refused(tmp_path, short, command):
    folder, model = short
    assert run("score", folder, "--method", "magnitude", "--output", tmp_path / "scores").exit_code == 0
    arguments = {
        "info": [folder],
        "bench": [folder, folder],
        "plan": [tmp_path / "scores", "--ratio", "0.3", "--budget", "flops", "--output", tmp_path / "plan.json"],
    }[command]
    result = run(command, *arguments, "--length", "15")
    assert "takes at most 14 tokens, not 15; pass --length 14" in str(result.exception)
    assert run(command, *arguments, "--length", "14").exit_code == 0


def test_long_texts_are_cut(tmp_path, short):
    folder, model = short
    train = write_csv(tmp_path / "train.csv", [(f"{text} " * 40, label) for text, label in ROWS])
    PruningPlan.for_model(model, heads={0: [1]}).save(tmp_path / "plan.json")
    score = ["score", folder, "--train-file", train, "--max-examples", "12", "--output", tmp_path / "scores"]
    prune = ["prune", folder, "--plan", tmp_path / "plan.json", "--train-file", train, "--overwrite"]
    for command in (score, [*prune, "--output", tmp_path / "out"]):
        for length, cut in (([], 128), (["--length", "20"], 20), (["--length", "10"], None)):
            result = run(*command, *length)
            assert result.exit_code == 0, result.exception
            note = f"hap: Texts are cut to 14 tokens, not {cut}: BertForSequenceClassification and its tokenizer"
            assert (note in result.stderr) == (cut is not None)


def test_roberta_numbers_positions_from_an_offset(tmp_path):
    model = make_model("roberta", vocab_size=40, dtype=torch.float32)
    limit = positions(model)
    model.save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(save_model(tmp_path)).save_pretrained(tmp_path / "m")
    train = write_csv(tmp_path / "train.csv", [(f"{text} " * 100, label) for text, label in ROWS])
    command = ["score", tmp_path / "m", "--train-file", train, "--max-examples", "8", "--output", tmp_path / "scores"]
    result = run(*command)
    assert result.exit_code == 0 and f"cut to {limit} tokens" in result.stderr, result.exception


def test_other_encodings(tmp_path, short):
    folder, model = short
    train = tmp_path / "train.csv"
    rows = "\n".join(f"{text} café,{label}" for text, label in ROWS)
    train.write_text(f"text,label\n{rows}\n", encoding="latin-1")
    PruningPlan.for_model(model, heads={0: [1]}).save(tmp_path / "plan.json")
    score = ["score", folder, "--train-file", train, "--output", tmp_path / "scores", "--max-examples", "8"]
    prune = ["prune", folder, "--plan", tmp_path / "plan.json", "--train-file", train, "--output", tmp_path / "out"]
    for command in (score, prune):
        assert "train.csv' is not UTF-8" in str(run(*command).exception)
        assert run(*command, "--encoding", "latin-1").exit_code == 0


def test_no_padding_token(tmp_path):
    """As GPT-2's: the end token pads, and the pruned model's config knows it."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = make_model("gpt2", dtype=torch.float32)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "m")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [("good film a b c", "yes"), ("bad", "no")] * 8
    train, scores = write_csv(tmp_path / "train.csv", rows), tmp_path / "scores"
    command = ["score", tmp_path / "m", "--train-file", train, "--length", "8", "--output", scores]
    assert (result := run(*command)).exit_code == 0, result.exception
    assert Sensitivity.load(scores).num_examples == 16
    PruningPlan.for_model(model, heads={0: [1]}).save(tmp_path / "plan.json")
    prune = ["prune", tmp_path / "m", "--plan", tmp_path / "plan.json", "--output", tmp_path / "out"]
    assert (result := run(*prune, "--train-file", train, "--length", "8")).exit_code == 0, result.exception
    pruned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert pruned.config.pad_token_id == 1
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "special_tokens_map.json").unlink(missing_ok=True)
    assert "neither a padding token nor an end token" in str(run(*command).exception)


def test_weights_keep_their_precision(tmp_path):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    command = ["prune", tmp_path / "dense", "--ratio", "0.3", "--method", "magnitude", "--output", tmp_path / "pruned"]
    assert run(*command).exit_code == 0
    weights = load_file(tmp_path / "pruned" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_classes_of_exported_code_are_those_of_transformers(tmp_path):
    """A model that exported code saved again names the class of that code."""
    make_model(dtype=torch.float32).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name, known in (("PrunedBert", True), ("MyBert", False)):
        values["architectures"] = [f"{name}ForSequenceClassification"]
        (tmp_path / "config.json").write_text(json.dumps(values))
        result = run("info", tmp_path)
        assert result.exit_code == (0 if known else 1)
        if known:
            assert "\nBertForSequenceClassification: " in result.output
        else:
            assert "of the class MyBertForSequenceClassification, which Transformers" in str(result.exception)


def test_adapters_are_named(tmp_path):
    model = make_model(dtype=torch.float32)
    model.add_adapter(LoraConfig(target_modules=["query"]))
    model.save_pretrained(tmp_path)
    result = run("info", tmp_path)
    assert result.exit_code == 1 and "is an adapter of PEFT" in str(result.exception)


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--device", "nowhere", "there is no device 'nowhere'"),
        ("--device", "cuda", "there is no device 'cuda'"),
        ("--precision", "int8", "'int8' is not one of 'bf16', 'fp16'"),
    ],
)
def test_what_is_not_there_is_named_before_anything_is_read(tmp_path, monkeypatch, flag, value, words):
    def missing(size, device):
        raise AssertionError("Torch not compiled with CUDA enabled")

    if value == "cuda":
        monkeypatch.setattr(torch, "empty", missing)
    result = run("score", tmp_path / "no model", "--output", tmp_path / "scores", flag, value)
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2 and words in message and flag in message
