"""What cannot be trimmed is named, before anything is changed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ByT5Tokenizer,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
)
from vocabularies import SEEN, byte_bpe, model_for, unigram, wordpiece

from hap_transformers import plan_vocabulary, trim_vocabulary
from hap_transformers.vocabulary import trim


@pytest.fixture
def tokenizer():
    return wordpiece()


def state_of(model, tokenizer):
    tensors = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    return tensors, model.config.to_dict(), tokenizer.get_vocab()


def assert_refused(message, model, tokenizer, texts=SEEN, error=ValueError, **settings):
    tensors, *others = copy.deepcopy(state_of(model, tokenizer))
    with pytest.raises(error, match=message):
        trim_vocabulary(model, tokenizer, texts, **settings)
    found, *others_found = state_of(model, tokenizer)
    assert others_found == others and found.keys() == tensors.keys()
    assert all(tensor.is_meta or torch.equal(tensor, tensors[name]) for name, tensor in found.items())


# ---- tokenizers


def test_slow_tokenizers(tokenizer):
    assert_refused("ByT5Tokenizer is not a fast tokenizer, and only those", model_for(tokenizer), ByT5Tokenizer())


def test_tokenizers_that_spell_nothing():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", eos_token="a")
    model = BertModel(BertConfig(vocab_size=2, hidden_size=12, num_hidden_layers=1, intermediate_size=8))
    message = "is a WordLevel tokenizer. Only those of the kinds WordPiece, BPE, Unigram can be trimmed"
    assert_refused(message, model, tokenizer)


def test_tokenizers_with_parts_in_python(tokenizer):
    class Own:
        def pre_tokenize(self, text):
            text.split(lambda i, part: [part])

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Own())
    assert_refused("has a part that cannot be written as JSON: ", model_for(tokenizer), tokenizer)


def test_tokenizers_of_other_models(tokenizer):
    assert_refused(
        r"has 4\d\d ids, but BertForMaskedLM has 2\d\d: the tokenizer is another model's. If it is not, call model",
        model_for(tokenizer),
        byte_bpe(),
    )
    assert_refused(
        r"has 2\d\d ids, but BertForMaskedLM has 1\d\d\d: the tokenizer is another",
        model_for(tokenizer, more=1025),
        tokenizer,
    )


def test_ids_that_the_tokenizers_library_would_number_otherwise():
    """The config uses an id that is no token, so added tokens cannot follow the others."""
    words = {"[UNK]": 0, "a": 1, "##a": 3, "aa": 4, "aaa": 7}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.add_tokens(["<new>"])
    sizes = {"vocab_size": 9, "hidden_size": 12, "num_hidden_layers": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(**sizes, pad_token_id=2))
    assert_refused("have gaps that the tokenizers library closes", model, tokenizer, ["a<new>"])


# ---- texts and settings


@pytest.mark.parametrize("texts", [[], ["", " "]], ids=["none", "empty"])
def test_no_text(tokenizer, texts):
    assert_refused(
        f"The {len(texts)} texts have no token. Give texts such as the mo", model_for(tokenizer), tokenizer, texts
    )


@pytest.mark.parametrize(
    "texts, message",
    [
        ("one text", "texts must be a list of strings"),
        (["a", ("b", "c")], "Text 1 is a tuple, not a string; give both"),
    ],
)
def test_texts_of_another_type(tokenizer, texts, message):
    assert_refused(message, model_for(tokenizer), tokenizer, texts, error=TypeError)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"keep": ["##river", 10**6]},
            r"keep names \['##river', 1000000\], which .* Name tokens as they stand in the",
        ),
        ({"keep": "river"}, "keep must be a list of tokens or ids, not the string 'river'"),
        ({"min_count": 0}, "min_count must be at least 1, not 0"),
    ],
)
def test_settings(tokenizer, settings, message):
    assert_refused(message, model_for(tokenizer), tokenizer, **settings)


@pytest.fixture
def warnings(monkeypatch):
    heard = []
    monkeypatch.setattr(trim.logger, "warning", heard.append)
    return heard


def test_texts_of_another_language(warnings):
    tokenizer = unigram()
    model = model_for(tokenizer)
    plan_vocabulary(model, tokenizer, SEEN)
    assert not warnings
    plan = plan_vocabulary(model, tokenizer, ["Река течёт мимо", "старой мельницы"])
    (warning,) = warnings
    assert f"Of {plan.size} tokens {len(plan.kept)} (" in warning and "Check that these texts are many" in warning
    assert "The 2 texts use" in warning and f"{plan.counts['unknown'] / plan.counts['tokens']:.1%} of all" in warning
    assert plan.counts["unknown"] >= 0.5 * plan.counts["tokens"]


def test_nearly_nothing_stays(warnings):
    words = {word: i for i, word in enumerate(["[UNK]", "a", "##a", *("a" * n for n in range(2, 60))])}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")
    model = BertModel(BertConfig(vocab_size=61, hidden_size=12, num_hidden_layers=1, intermediate_size=8))
    plan_vocabulary(model, tokenizer, ["aa"])
    assert "Of 61 tokens 4 (6.6%) stay. The 1 texts use 1 different tokens, and 0.0% of all" in warnings[0]


# ---- models


def test_models_with_adapters(tokenizer):
    adapted = get_peft_model(model_for(tokenizer), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="PeftModel is not a PreTrainedModel. Trim the model inside, before adapters"):
        trim_vocabulary(adapted, tokenizer, SEEN)
    model = model_for(tokenizer)
    model.add_adapter(LoraConfig(target_modules=["word_embeddings"]))
    assert_refused(
        "word_embeddings.weight' of this BertForMaskedLM is not an ordinary tensor.*adapters", model, tokenizer
    )


def test_quantized_heads(tokenizer):
    model = model_for(tokenizer, "distilbert")
    torch.ao.quantization.quantize_dynamic(
        model, {"vocab_projector": torch.ao.quantization.default_dynamic_qconfig}, inplace=True
    )
    assert_refused("'vocab_projector.weight' of this DistilBertForMaskedLM is not an ord", model, tokenizer)


def test_weights_that_are_not_in_memory(tokenizer):
    model = model_for(tokenizer).to("meta")
    assert_refused("'bert.embeddings.word_embeddings.weight' of this BertForMaskedLM is not in mem", model, tokenizer)


def test_configs_of_other_sizes(tokenizer):
    model = model_for(tokenizer)
    model.config.vocab_size += 1
    assert_refused(r"has the shape \[\d+, 16\], and its config has a vocab_size of \d+. Load the wh", model, tokenizer)


def test_ties_of_the_users_own(tokenizer):
    model = model_for(tokenizer, task="ForSequenceClassification")
    model.head = torch.nn.Linear(16, 3)
    model.head.weight = model.get_input_embeddings().weight
    assert_refused("'head.weight' of this Bert.* shares its values with 'bert.embeddings", model, tokenizer)


def test_classes_that_are_not_built_from_a_config(tokenizer):
    class Own(BertForMaskedLM):
        def __init__(self, config, size):
            super().__init__(config)

    model = Own(model_for(tokenizer).config, 3)
    assert_refused("Own cannot be built from its config alone, so a trimmed one could not", model, tokenizer)


def test_several_vocabularies(tokenizer):
    config = model_for(tokenizer).config
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(config, copy.deepcopy(config)))
    assert_refused("config of a 'encoder-decoder' has 2 vocabularies; .* Trim the models", model, tokenizer)
    model = model_for(tokenizer)
    model.config.vocab_size_per_layer_input = 7
    assert_refused("config of a 'bert' has a second vocabulary, vocab_size_per_layer_input", model, tokenizer)
