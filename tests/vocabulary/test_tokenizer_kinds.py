"""Small vocabularies of every kind, against all words over three letters."""

import itertools
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from hap_transformers.vocabulary.kinds import BYTES, KINDS


pytestmark = pytest.mark.any_release


LETTERS = "abc"
WORDS = ["".join(word) for length in range(1, 6) for word in itertools.product(LETTERS, repeat=length)]
UNKNOWN = "?"
EXAMPLES = settings(max_examples=60, deadline=None)
seen_words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5)
few_words = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=8)
letters = st.sets(st.sampled_from(LETTERS), min_size=2)


def tokens(backend, word):
    return backend.encode(word).tokens


def trimmed(model, seen):
    """A tokenizer, and one without the tokens that some words do not use."""
    backend = Tokenizer(model)
    content = json.loads(backend.to_str())
    content["model"] = cut(content["model"], {token for word in seen for token in tokens(backend, word)})
    return backend, Tokenizer.from_str(json.dumps(content))


def cut(model, used):
    kind = KINDS[model["type"]]
    kept = {UNKNOWN, *used} | kind.needed(model, used, {UNKNOWN})
    order = [entry[0] if isinstance(entry, list) else entry for entry in model["vocab"]]
    return kind.keep(model, {token: new for new, token in enumerate(t for t in order if t in kept)})


def assert_alike(before, after, seen):
    """Words seen have the same tokens, all words are as known as before, and known ones are spelled alike."""
    assert [tokens(after, word) for word in seen] == [tokens(before, word) for word in seen]
    for word in WORDS:
        old, new = tokens(before, word), tokens(after, word)
        assert (UNKNOWN in new) == (UNKNOWN in old), word
        assert UNKNOWN in new or "".join(new).replace("#", "") == word


@EXAMPLES
@given(letters, letters, few_words, few_words, seen_words)
def test_word_pieces(begin, inside, begins, continuations, seen):
    pieces = [*begin, *("##" + letter for letter in inside), *begins, *("##" + word for word in continuations)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([UNKNOWN, *pieces]))}
    assume(all(set(word) <= inside for word in continuations))
    assert_alike(*trimmed(models.WordPiece(vocabulary, unk_token=UNKNOWN), seen), seen)


@EXAMPLES
@given(letters, st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=12), seen_words, st.booleans())
def test_merges(alphabet, pairs, seen, ignore_merges):
    """The same token can come from several merges, such as abc from ab + c and from a + bc."""
    found, merges = sorted(alphabet), []
    for left, right in pairs:
        pair = found[left % len(found)], found[right % len(found)]
        if pair not in merges and len("".join(pair)) <= 5:
            merges.append(pair)
            found += [] if "".join(pair) in found else ["".join(pair)]
    vocabulary = {token: i for i, token in enumerate([UNKNOWN, *found])}
    model = models.BPE(vocabulary, merges, unk_token=UNKNOWN, ignore_merges=ignore_merges)
    assert_alike(*trimmed(model, seen), seen)


@EXAMPLES
@given(st.dictionaries(st.text(LETTERS, min_size=1, max_size=4), st.floats(-9, -1), max_size=9), letters, seen_words)
def test_scores(scores, alphabet, seen):
    scores = {**dict.fromkeys(sorted(alphabet), -8.0), **scores}
    assume(all(set(token) <= scores.keys() for token in scores))
    before, after = trimmed(models.Unigram([(UNKNOWN, 0.0), *scores.items()], unk_id=0), seen)
    unknown = {before.token_to_id(UNKNOWN)}
    for word in WORDS:
        old, new = before.encode(word), after.encode(word)
        assert (0 in new.ids) == (not unknown.isdisjoint(old.ids)) and "".join(new.tokens) == "".join(old.tokens)
    assert [tokens(after, word) for word in seen] == [tokens(before, word) for word in seen]


def test_only_merges_on_the_way_to_a_token_are_needed():
    """Abc comes from ab + c, never from a + bc, whose rank is higher than that of a + b."""
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"), ("c", "c")]
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "cc"])}
    model = json.loads(Tokenizer(models.BPE(vocabulary, merges)).to_str())["model"]
    smaller = cut(model, {"abc"})
    assert list(smaller["vocab"]) == ["a", "b", "c", "ab", "abc"]
    assert smaller["merges"] == [["a", "b"], ["ab", "c"]]


def test_prefixes_and_suffixes_of_merges():
    """As CLIP marks the end of a word, and others its inside."""
    tokens_of_words = ["a", "b", "a@", "b@", "#a", "#b", "#a@", "#b@", "ab@", "a#b"]
    vocabulary = {token: i for i, token in enumerate(["?", *tokens_of_words, "aba@", "bb@"])}
    merges = [("a", "#b@"), ("a", "#b"), ("ab", "#a@"), ("b", "#b@")]
    vocabulary |= {"ab": len(vocabulary)}
    model = models.BPE(
        vocabulary, merges, unk_token="?", continuing_subword_prefix="#", end_of_word_suffix="@", fuse_unk=True
    )
    before, after = trimmed(model, ["aba"])
    assert tokens(before, "aba") == tokens(after, "aba") == ["aba@"]
    assert tokens(before, "bb") == ["bb@"] and tokens(after, "bb") == ["b", "#b@"]
    assert tokens(before, "ab") == ["ab@"] and tokens(after, "ab") == ["a", "#b@"]


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_bytes_take_the_place_of_characters(kind):
    in_bytes = sorted(BYTES)
    if kind == "BPE":
        vocabulary = {token: i for i, token in enumerate([UNKNOWN, *in_bytes, "a", "b", "c", "ab"])}
        model = models.BPE(vocabulary, [("a", "b")], unk_token=UNKNOWN, byte_fallback=True)
    else:
        scores = [(token, -5.0) for token in [UNKNOWN, *in_bytes, "a", "b", "c", "ab"]]
        model = models.Unigram(scores, unk_id=0, byte_fallback=True)
    before, after = trimmed(model, ["ab"])
    assert tokens(after, "ab") == ["ab"] and after.token_to_id("c") is None
    assert tokens(before, "abc") == ["ab", "c"] and tokens(after, "abc") == ["ab", "<0x63>"]


def test_whole_words_whose_letters_are_no_pieces_stay():
    vocabulary = {token: i for i, token in enumerate(["?", "a", "b", "good", "bad", "ab", "##b"])}
    before, after = trimmed(models.WordPiece(vocabulary, unk_token="?"), ["bad"])
    assert after.get_vocab().keys() == {"?", "a", "b", "good", "bad", "##b"}
    assert tokens(after, "good") == ["good"] and tokens(before, "ab") == ["ab"] and tokens(after, "ab") == ["a", "##b"]


def test_whole_words_that_are_not_merged_stay_where_their_letters_are_none():
    """With `ignore_merges`, as Llama 3 has it, a word that is a token is never split."""
    vocabulary = {token: i for i, token in enumerate([UNKNOWN, "a", "b", "ab", "xy", "bb"])}
    model = models.BPE(vocabulary, [("a", "b"), ("b", "b")], unk_token=UNKNOWN, ignore_merges=True)
    _, after = trimmed(model, ["ab"])
    assert after.get_vocab().keys() == {UNKNOWN, "a", "b", "ab", "xy"} and tokens(after, "xy") == ["xy"]


@pytest.mark.parametrize(
    "model",
    [
        models.WordPiece({t: i for i, t in enumerate(["?", "a", "ab", "##b", "##bc", "##c", "##cd"])}, unk_token="?"),
        models.Unigram([("?", 0.0), ("a", -2.0), ("ab", -1.0)], unk_id=0),
    ],
    ids=["WordPiece", "Unigram"],
)
def test_other_words_with_such_letters_could_become_unknown(model):
    """Here abcd is ab, ##cd. Without ab, it would be a, ##bc and then unknown."""
    with pytest.raises(ValueError, match="'(##cd|ab)' and 0 others with characters that are no tokens themselves"):
        trimmed(model, ["a"])


def test_the_lowest_score_stays():
    """An unknown character counts ten less than the lowest score."""
    scores = [("?", 0.0), ("a", -2.0), ("b", -3.0), ("aa", -50.0), ("ab", -9.0)]
    _, after = trimmed(models.Unigram(scores, unk_id=0), ["a"])
    assert after.get_vocab().keys() == {"?", "a", "b", "aa"}
