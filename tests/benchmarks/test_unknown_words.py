"""Words in place of `<unk>`."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.unknown_words import filled_in, unknown_words
from language_scripts.demo_model import demo_tokenizer


pytestmark = pytest.mark.any_release


def letters(text):
    return text.isalpha() and text.isascii()


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer("the <unk> river runs < slower than a boat , and no boat runs like the <unk> < unk > " * 40)


def test_every_place_is_found(tokenizer):
    text = "the <unk> river ( <unk> <unk> ) < unk >"
    tokens = tokenizer.tokenize(text)
    found = ["".join(tokens[first:end]) for first, end in unknown_words(tokens)]
    assert len(found) == text.count("<unk>") and {word.lstrip("Ġ") for word in found} == {"<unk>"}


def test_words_are_those_that_the_model_draws(tokenizer):
    """By generation from the start of every window, word after word, with the same numbers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).eval()
    texts = ["the <unk> river runs <unk> <unk> slower", "<unk> boat , and no boat runs like the <unk>"]
    ids = [tokenizer(text).input_ids for text in texts]
    length = min(map(len, ids))
    windows = torch.tensor([row[:length] for row in ids])
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    expected, generator = [], torch.Generator().manual_seed(3)
    for row in windows.tolist():
        text, place = [], 0
        for first, end in unknown_words([vocabulary[token] for token in row]):
            text, place = text + row[place:first], end
            word = []
            while text and len(word) < 6:
                logits = model(torch.tensor([text + word])).logits[0, -1].detach()
                if not word:
                    logits[[not (token[0] == "Ġ" and letters(token[1:2])) for token in vocabulary]] = -torch.inf
                token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
                if word and not letters(vocabulary[token]):
                    break
                word.append(token)
            text += word
        expected += text + row[place:]
    found = filled_in(windows, model, tokenizer, seed=3)
    assert found.flatten().tolist() == expected[: len(expected) // length * length]
    assert torch.equal(found, filled_in(windows, model, tokenizer, seed=3))
    assert not unknown_words([vocabulary[token] for token in found.flatten().tolist()])
