"""Tokenizers without a padding token, and texts longer than the model takes."""

import sys

import pytest
import torch
from datasets import Dataset, DatasetDict
from script_inputs import WORDS
from tiny import make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hap_transformers.data.tokenizers import cut_note, longest_text, set_padding, validate_tokens
from hap_transformers.tokens import positions


def tokenizer(**special):
    """Words split at spaces, without special tokens but those given."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", "<pad>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def test_the_end_token_pads():
    model, given = make_model("gpt2").float(), tokenizer(eos_token="<end>")
    model.config.pad_token_id = None
    set_padding(given, model)
    assert given.pad_token == "<end>" and model.config.pad_token_id == 1
    batch = given(["good film", "bad"], padding=True, return_tensors="pt")
    alone = given(["bad"], return_tensors="pt")
    assert torch.allclose(model(**batch).logits[1], model(**alone).logits[0], atol=1e-5)


def test_the_token_of_the_config_comes_first():
    model, given = make_model("gpt2"), tokenizer(eos_token="<end>")
    model.config.pad_token_id = 2
    set_padding(given, model)
    assert given.pad_token == "<pad>"


def test_a_tokenizer_that_pads_tells_the_config():
    model, given = make_model("gpt2"), tokenizer(eos_token="<end>", pad_token="<pad>")
    model.config.pad_token_id = None
    set_padding(given, model)
    assert given.pad_token == "<pad>" and model.config.pad_token_id == 2


def test_neither_padding_nor_end():
    model = make_model("gpt2")
    model.config.pad_token_id, model.config.name_or_path = None, "me/model"
    with pytest.raises(ValueError, match="tokenizer of 'me/model' has neither a padding token nor an end token"):
        set_padding(tokenizer(), model)


def test_a_padding_token_that_the_model_does_not_know():
    model, given = make_model("gpt2"), tokenizer()
    given.add_special_tokens({"pad_token": "[PAD]"})
    given.add_tokens([f"word{i}" for i in range(200)])
    given.pad_token = "word199"
    with pytest.raises(ValueError, match=r"pads by 'word199', number \d+, and the model knows \d+ tokens"):
        set_padding(given, model)


def test_tokens_that_the_model_does_not_know():
    model, given = make_model("gpt2", vocab_size=20), tokenizer(pad_token="<pad>")
    model.config.name_or_path = "me/model"

    def data(text):
        return DatasetDict(train=Dataset.from_dict(dict(given([text]))))

    validate_tokens(data("a b c"), given, model)  # Rows beyond the vocabulary that no text uses do no harm.
    with pytest.raises(ValueError, match=r"the token 'plot', number 32, and 'me/model' knows 20 tokens"):
        validate_tokens(data("good plot"), given, model)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "distilbert", "mpnet", "bart"])
def test_positions_are_those_that_run(name):
    """A text of as many tokens runs, one of a token more does not."""
    model = make_model(name).float().eval()
    limit = positions(model)
    ids = torch.full((1, limit), 5)
    ids[:, -1] = model.config.eos_token_id if name == "bart" else 5
    model(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.cat([torch.full((1, 1), 5), ids], 1))


def test_models_without_a_table():
    assert positions(make_model("llama")) is None and longest_text(make_model("llama")) == sys.maxsize


def test_texts_are_cut(model_dir):
    model, given = make_model(vocab_size=40), AutoTokenizer.from_pretrained(model_dir)
    limit = positions(model)
    assert cut_note(model, given, 5) == (5, None)
    kept, note = cut_note(model, given, 500)
    assert kept == limit and note.startswith(
        f"Texts are cut to {limit} tokens, not 500: BertForSequenceClassification"
    )
    given.model_max_length = 7
    assert cut_note(model, given, 128)[0] == 7
    with pytest.raises(ValueError, match="Texts of 2 tokens have no room for words beside 2 special tokens"):
        cut_note(model, given, 2)
    assert cut_note(model, given, 3)[0] == 3 and cut_note(model, given, 5, pair=True)[0] == 5
    with pytest.raises(ValueError, match="Pairs of 4 tokens have no room for words beside 3 special tokens"):
        cut_note(model, given, 4, pair=True)
