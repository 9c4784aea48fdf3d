"""Fields that hold ids of tokens, in configs, modules and tokenizers."""

from collections.abc import Callable, Iterable
from typing import Any


# From the id of a token to its new one.
Renumber = Callable[[int], int]

SUFFIXES = ("_token_id", "_token_ids", "_token_index")
NAMES = {
    "padding_idx",  # modules
    "suppress_tokens",  # configs of generation
    "begin_suppress_tokens",
    "forced_decoder_ids",
    "bad_words_ids",
    "force_words_ids",
    "sequence_bias",
    "lang_to_id",
    "task_to_id",
    "prefix_tokens",  # tokenizers with codes of languages
    "suffix_tokens",
    "cur_lang_code",
    "cur_lang_code_id",
    "lang_code_to_id",
    "id_to_lang_code",
    "fairseq_tokens_to_ids",
    "fairseq_ids_to_tokens",
}


def renumber_fields(holder: Any, renumber: Renumber) -> None:
    """Writes new ids into all fields of an object that hold ids."""
    vars(holder).update(_renumbered_fields(holder, renumber))


def ids_in_fields(holders: Iterable[Any]) -> set[int]:
    """All ids in fields of some objects."""
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    for holder in holders:
        _renumbered_fields(holder, note)
    return found


def _renumbered_fields(holder: Any, renumber: Renumber) -> dict[str, Any]:
    fields = vars(holder)
    found = _renumbered_names(fields, renumber)
    by_task = fields.get("task_specific_params")
    if isinstance(by_task, dict):  # Settings that a pipeline puts into the config.
        found["task_specific_params"] = {
            task: {**settings, **_renumbered_names(settings, renumber)} if isinstance(settings, dict) else settings
            for task, settings in by_task.items()
        }
    return found


def _renumbered_names(fields: dict[str, Any], renumber: Renumber) -> dict[str, Any]:
    chosen = {name: value for name, value in fields.items() if name in NAMES or name.endswith(SUFFIXES)}
    return {name: _renumbered(name, value, renumber) for name, value in chosen.items()}


def _renumbered(name: str, value: Any, renumber: Renumber) -> Any:
    if name == "forced_decoder_ids" and value:  # Pairs of a position and an id.
        return [[position, within(token, renumber)] for position, token in value]
    return within(value, renumber)


def within(value: Any, renumber: Renumber) -> Any:
    """Renumbers all whole numbers in nested lists and dictionaries; all else stays."""
    match value:
        case bool():
            return value
        case int():
            return renumber(value)
        case list() | tuple():
            return type(value)(within(item, renumber) for item in value)
        case dict():
            return {within(key, renumber): within(item, renumber) for key, item in value.items()}
    return value
