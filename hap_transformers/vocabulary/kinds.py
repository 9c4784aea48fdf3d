"""Which tokens a vocabulary cannot do without, and a smaller vocabulary, for every kind of tokenizer.

A kind reads and writes the `model` of the JSON that the tokenizers library makes of a tokenizer.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


Model = dict[str, Any]
Tokens = Collection[str]

BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class TokenizerKind:
    """A kind of tokenizer.

    Args:
        needed (`Callable`): From the model, the tokens that stay in any case, and those that are never part of a word
            (special tokens): the tokens that must stay, too.
        keep (`Callable`): From the model and the new id of each token that stays: the model with these alone.
        unknown (`Callable`): From the model: the id of its token for what is unknown, or `None`.
    """

    needed: Callable[[Model, Tokens, Tokens], set[str]]
    keep: Callable[[Model, Mapping[str, int]], Model]
    unknown: Callable[[Model], int | None]


def _needed_pieces(model: Model, kept: Tokens, special: Tokens) -> set[str]:
    """What WordPiece needs: single characters, in the form that begins a word and in the one that continues it.

    WordPiece takes the longest token that fits, again and again, and a word is unknown where none fits. A word of
    characters that have both forms can therefore not become unknown, whichever way the longer tokens that are left
    lead. Tokens with other characters stay. If they begin a word, a word that needs one still starts with it. If they
    continue one, longer tokens before them could lead past their beginning: such vocabularies are refused.
    """
    vocabulary, prefix = model["vocab"], model["continuing_subword_prefix"]
    needed, lacking = _spelled(vocabulary, special, lambda token: _symbols(token, prefix))
    _validate_spelled([token for token in lacking if token.startswith(prefix)])
    return needed | set(lacking)


def _needed_merges(model: Model, kept: Tokens, special: Tokens) -> set[str]:
    """What BPE needs: single characters, and all that is merged on the way to a token that stays.

    A text is split into characters, and the pair with the lowest rank is merged, again and again. Inside a token these
    are the same merges in every text, because no merge crosses its borders. With them, and fewer others in the same
    order, the pair with the lowest rank is the same at every step, so a text of such tokens is split as before. Only a
    character that is missing is unknown.
    """
    vocabulary, prefix = model["vocab"], model["continuing_subword_prefix"] or ""
    suffix = model["end_of_word_suffix"] or ""
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    merged = (_merged(_symbols(token, prefix, suffix), ranks, prefix) for token in kept if token not in special)
    needed = set().union(*merged) & vocabulary.keys()
    if _falls_back(model, vocabulary):
        return needed | BYTES
    spelled, lacking = _spelled(vocabulary, special, lambda token: _symbols(token, prefix, suffix))
    # If words that are tokens are not split (`ignore_merges`), no merge needs to make them, and none may be able to.
    whole = set(lacking) if model["ignore_merges"] else set()
    return needed | spelled | whole | (BYTES & vocabulary.keys())


def _needed_scores(model: Model, kept: Tokens, special: Tokens) -> set[str]:
    """What Unigram needs: single characters, and the token with the lowest score.

    Among all ways to split a text, Unigram takes the one with the highest sum of scores. The way of a text whose
    tokens all stay is still there, with fewer rivals. Only a character without a token of its own can be unknown. Its
    score is counted from the lowest of the vocabulary, which therefore stays.
    """
    scores = dict(model["vocab"])
    lowest = min(scores, key=lambda token: scores[token])
    if _falls_back(model, scores):
        return {lowest} | BYTES
    needed, lacking = _spelled(scores, special, list)
    _validate_spelled(lacking)
    return needed | {lowest} | (BYTES & scores.keys())


def _spelled(vocabulary: Tokens, special: Tokens, symbols: Callable[[str], list[str]]) -> tuple[set[str], list[str]]:
    """Tokens of one character, and tokens with a character that is no token itself."""
    spellings = {token: symbols(token) for token in vocabulary if token not in special}
    single = {token for token, spelling in spellings.items() if len(spelling) == 1}
    lacking = [token for token, spelling in spellings.items() if not all(part in vocabulary for part in spelling)]
    return single, lacking


def _validate_spelled(lacking: Iterable[str]) -> None:
    if names := list(lacking):
        raise ValueError(
            f"The vocabulary has {names[0]!r} and {len(names) - 1} others with characters that are no tokens "
            "themselves. Without other tokens, words with such characters could become unknown, so this vocabulary "
            "cannot be trimmed."
        )


def _symbols(token: str, prefix: str, suffix: str = "") -> list[str]:
    """The characters of a token, with the prefix of those that continue a word and the suffix of those that end it."""
    begins = prefix if token.startswith(prefix) and token != prefix else ""
    ends = suffix if token.endswith(suffix) and token != suffix else ""
    first, *others = list(token[len(begins) : len(token) - len(ends)]) or [""]
    symbols = [begins + first, *(prefix + character for character in others)]
    return [*symbols[:-1], symbols[-1] + ends]


def _merged(symbols: list[str], ranks: Mapping[tuple[str, ...], int], prefix: str) -> set[str]:
    """A token's characters, and everything that is merged on the way to it."""
    parts, found = list(symbols), set(symbols)
    while pairs := [(ranks[pair], i) for i, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in ranks]:
        _, i = min(pairs)
        parts[i : i + 2] = [_joined(parts[i], parts[i + 1], prefix)]
        found.add(parts[i])
    return found


def _joined(left: str, right: str, prefix: str) -> str:
    return left + right[len(prefix) :]


def _falls_back(model: Model, vocabulary: Tokens) -> bool:
    """Whether every character that is no token is spelled in bytes."""
    return model["byte_fallback"] and all(byte in vocabulary for byte in BYTES)


def _keep_pieces(model: Model, new_ids: Mapping[str, int]) -> Model:
    return {**model, "vocab": {token: new_ids[token] for token in model["vocab"] if token in new_ids}}


def _keep_merges(model: Model, new_ids: Mapping[str, int]) -> Model:
    prefix = model["continuing_subword_prefix"] or ""
    merges = [
        [left, right]
        for left, right in model["merges"]
        if left in new_ids and right in new_ids and _joined(left, right, prefix) in new_ids
    ]
    return {**_keep_pieces(model, new_ids), "merges": merges}


def _keep_scores(model: Model, new_ids: Mapping[str, int]) -> Model:
    vocabulary, unknown = model["vocab"], model["unk_id"]
    unknown = None if unknown is None else new_ids[vocabulary[unknown][0]]
    return {**model, "vocab": [entry for entry in vocabulary if entry[0] in new_ids], "unk_id": unknown}


def _unknown_by_name(model: Model) -> int | None:
    return model["vocab"].get(model["unk_token"])


# By the name of the model in the tokenizers library.
KINDS = {
    "WordPiece": TokenizerKind(_needed_pieces, _keep_pieces, _unknown_by_name),
    "BPE": TokenizerKind(_needed_merges, _keep_merges, _unknown_by_name),
    "Unigram": TokenizerKind(_needed_scores, _keep_scores, lambda model: model["unk_id"]),
}
