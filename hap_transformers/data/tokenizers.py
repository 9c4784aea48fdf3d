"""Loads tokenizers, and fits them to a model: padding and the length of texts."""

import sys

from datasets import DatasetDict
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..tokens import positions


def load_tokenizer(name: str, **file: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    For a folder without a tokenizer, Transformers 4.57 fails. Transformers 5 makes an empty tokenizer, which knows no
    word; this function refuses it.

    Args:
        name (`str`): Hub name or folder of the model.
        file (`str`): `gguf_file`, where it is to be read from such a file.

    Raises:
        ValueError: If the model has no tokenizer.
    """
    remedy = (
        f"'{name}' has no tokenizer that can be loaded. Save the tokenizer of the model's training in that folder by "
        "tokenizer.save_pretrained(...). A trainer does that itself if it was made with processing_class=tokenizer."
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **file)
    except (AttributeError, OSError, TypeError, ValueError) as error:  # 4.57 raises the first for T5.
        raise ValueError(f"{remedy} ({error})") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(remedy)
    return tokenizer


def set_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Gives a tokenizer the padding token of its model, or else the end token, and tells the model's config which.

    Raises:
        ValueError: If there is no such token, or the model has no embedding for it.
    """
    named, config = f"The tokenizer of '{model.config.name_or_path}'", model.config
    if tokenizer.pad_token is None:
        number, token = getattr(config, "pad_token_id", None), tokenizer.eos_token
        if number is not None and 0 <= number < len(tokenizer):
            token = tokenizer.convert_ids_to_tokens(number)
        if token is None:
            raise ValueError(
                f"{named} has neither a padding token nor an end token, so texts cannot form a batch. Choose a token "
                "that it knows: set tokenizer.pad_token, then tokenizer.save_pretrained(...)."
            )
        tokenizer.pad_token = token
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding) and tokenizer.pad_token_id >= embeddings.num_embeddings:
        raise ValueError(
            f"{named} pads by '{tokenizer.pad_token}', number {tokenizer.pad_token_id}, and the model knows "
            f"{embeddings.num_embeddings} tokens. Call model.resize_token_embeddings(len(tokenizer)) and save it."
        )
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def validate_tokens(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Checks that a model knows all tokens of tokenized texts.

    Raises:
        ValueError: If it does not: the tokenizer is another model's, or got tokens that the model did not.
    """
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding) or len(tokenizer) <= embeddings.num_embeddings:
        return
    highest = max((token for rows in data.values() for ids in rows["input_ids"] for token in ids), default=0)
    if highest >= embeddings.num_embeddings:
        raise ValueError(
            f"The texts have the token '{tokenizer.convert_ids_to_tokens(highest)}', number {highest}, and "
            f"'{model.config.name_or_path}' knows {embeddings.num_embeddings} tokens. Give the model's tokenizer, or "
            "call model.resize_token_embeddings(len(tokenizer)) and save it."
        )


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """How many tokens a text may have for a model and its tokenizer; `sys.maxsize` if neither has a limit."""
    limits = [positions(model), None if tokenizer is None else tokenizer.model_max_length]
    return min([sys.maxsize, *(int(limit) for limit in limits if limit is not None)])


def cut_note(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, pair: bool = False
) -> tuple[int, str | None]:
    """Returns the length to cut texts to, and a sentence if that is less than was asked for.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        length (`int`): The length that was asked for.
        pair (`bool`, *optional*, defaults to `False`): Whether texts are pairs, of which each needs a word.

    Raises:
        ValueError: If texts of this length have no room for a word.
    """
    limit, special = longest_text(model, tokenizer), tokenizer.num_special_tokens_to_add(pair=pair)
    kept = min(length, limit)
    if kept < special + 1 + pair:
        raise ValueError(
            f"{'Pairs' if pair else 'Texts'} of {kept} tokens have no room for words beside {special} special tokens; "
            "allow more."
        )
    if kept == length:
        return length, None
    return (
        kept,
        f"Texts are cut to {kept} tokens, not {length}: {type(model).__name__} and its tokenizer take no more.",
    )
