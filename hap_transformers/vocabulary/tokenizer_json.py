"""Fast tokenizers as JSON: the ids that stand in it beside the vocabulary, and a tokenizer with fewer tokens."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .ids import Renumber, within
from .kinds import KINDS


def read_json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The JSON of a fast tokenizer.

    Raises:
        ValueError: If the tokenizer is slow, has parts in Python, or is of an unknown kind.
    """
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{name} is not a fast tokenizer, and only those of the tokenizers library can be trimmed. Load it with "
            "AutoTokenizer.from_pretrained(..., use_fast=True). Nothing was changed."
        )
    try:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # The library raises a plain Exception for parts in Python.
        raise ValueError(f"{name} has a part that cannot be written as JSON: {error}. Nothing was changed.") from error
    if content["model"]["type"] not in KINDS:
        raise ValueError(
            f"{name} is a {content['model']['type']} tokenizer. Only those of the kinds {', '.join(KINDS)} can be "
            "trimmed: they spell words that they do not know. Nothing was changed."
        )
    return content


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short name of all tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def ids_in_json(content: dict[str, Any]) -> set[int]:
    """Ids of added tokens, of the unknown token and in settings."""
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    _settings(content, note)
    unknown = KINDS[content["model"]["type"]].unknown(content["model"])
    return found if unknown is None else {*found, unknown}


def special_tokens(content: dict[str, Any]) -> set[str]:
    """Added tokens, which are cut out of a text before it is split."""
    return {token["content"] for token in content["added_tokens"]}


def trimmed_backend(
    tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], new_ids: Mapping[int, int]
) -> Tokenizer:
    """A tokenizer of the tokenizers library with the tokens that stay.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The fast tokenizer, which is only read.
        content (`dict[str, Any]`): Its JSON.
        new_ids (`Mapping[int, int]`): The new id of every id that stays, ascending.

    Raises:
        ValueError: If the tokenizers library would number the tokens otherwise.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    kept = {token: new_ids[old] for token, old in vocabulary if old in new_ids}
    smaller = KINDS[content["model"]["type"]].keep(content["model"], kept)
    backend = _backend({**_settings(content, lambda token: new_ids.get(token, token)), "model": smaller}, tokenizer)
    if backend.get_vocab(with_added_tokens=True) != kept:
        raise ValueError(
            f"The ids of {type(tokenizer).__name__} have gaps that the tokenizers library closes, so its tokens and "
            "the rows of the embeddings would no longer belong together. Nothing was changed."
        )
    return backend


def whole_texts_backend(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any]) -> Tokenizer:
    """A copy of a tokenizer of the tokenizers library that neither cuts texts nor pads them."""
    return _backend({**content, "truncation": None, "padding": None}, tokenizer)


def _backend(content: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens  # The JSON does not have it.
    return backend


def _settings(content: dict[str, Any], renumber: Renumber) -> dict[str, Any]:
    """The JSON with new ids everywhere but in its model."""
    added = [{**token, "id": renumber(token["id"])} for token in content["added_tokens"]]
    padding = content["padding"] and {**content["padding"], "pad_id": renumber(content["padding"]["pad_id"])}
    processor = _post_processor(content["post_processor"], renumber)
    added.sort(key=lambda token: token["id"])
    return {**content, "added_tokens": added, "padding": padding, "post_processor": processor}


def _post_processor(part: Any, renumber: Renumber) -> Any:
    """A post-processor, or a part of one; ids stand in `ids` of templates, and after the token in `sep` and `cls`."""
    match part:
        case list():
            return [_post_processor(item, renumber) for item in part]
        case dict():
            with_ids = ("ids", "sep", "cls")
            return {
                name: within(item, renumber) if name in with_ids else _post_processor(item, renumber)
                for name, item in part.items()
            }
    return part
