"""Gives a text back the words that its publishers took out, so that it reads like the texts that a model serves.

The word-level version of WikiText-2 has `<unk>` in place of every rare word, one in eighteen. No user's text has that.
"""

import re

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


UNKNOWN = ("unk", ">")
# Tokens of a word at most.
LONGEST = 6


def unknown_words(tokens: list[str]) -> list[tuple[int, int]]:
    """Where `<unk>` lies among tokens, as places of its first token and behind its last.

    >>> unknown_words(["ĠA", "Ġ<", "unk", ">", "Ġlobster"])
    [(1, 4)]
    """
    places = range(len(tokens) - 2)
    return [(i, i + 3) for i in places if tokens[i].endswith("<") and tuple(tokens[i + 1 : i + 3]) == UNKNOWN]


@torch.no_grad()
def filled_in(
    windows: torch.Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> torch.Tensor:
    """Replaces every `<unk>` by a word that a language model draws given what comes before it in its window.

    A word begins with a token that is a space and a letter, and goes on while the tokens drawn are letters alone.

    Args:
        windows (`torch.Tensor`): Token ids, shape `(windows, length)`.
        model (`PreTrainedModel`): The language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, in which `Ġ` stands for a space.
        seed (`int`, *optional*, defaults to 0): Seed of the draw.

    Returns:
        `torch.Tensor`: All windows one after the other, cut to the same length; shape `(windows left, length)`.
    """
    vocabulary = tokenizer.convert_ids_to_tokens(range(model.get_output_embeddings().weight.shape[0]))
    begins = torch.tensor([bool(re.match(r"Ġ[A-Za-z]", token or "")) for token in vocabulary])
    goes_on = torch.tensor([bool(re.fullmatch(r"[A-Za-z]+", token or "")) for token in vocabulary])
    generator, text = torch.Generator().manual_seed(seed), list[int]()
    for window in tqdm(windows.tolist(), desc="Filling in unknown words", disable=None):
        cache, logits, start = DynamicCache(), None, 0
        for first, end in unknown_words([vocabulary[token] for token in window]):
            known, start, word = window[start:first], end, list[int]()
            if known:
                logits = _read(model, known, cache)
            while logits is not None and len(word) < LONGEST:  # What begins a window is left out.
                allowed = logits if word else logits.masked_fill(~begins, -torch.inf)
                token = int(torch.multinomial(allowed.softmax(-1), 1, generator=generator))
                if word and not goes_on[token]:
                    break
                word.append(token)
                logits = _read(model, [token], cache)
            text += known + word
        text += window[start:]
    length = windows.shape[1]
    return torch.tensor(text[: len(text) // length * length]).view(-1, length)


def _read(model: PreTrainedModel, tokens: list[int], cache: DynamicCache) -> torch.Tensor:
    """Logits of the token behind some tokens, which go into the cache."""
    return model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
