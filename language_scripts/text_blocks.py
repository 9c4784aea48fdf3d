"""Cuts texts into blocks of tokens, and refuses texts that a model cannot learn or be measured on."""

import math
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hap_transformers.data.reading import decoded, require_file


# Share of the blocks that are held out where there is no second file: the last ones.
HELD_OUT = 0.1
# Blocks that a model is tried on before anything is scored.
TRIED = 2


def read_text(file: str, encoding: str | None = None) -> str:
    """Reads a plain text.

    Raises:
        FileNotFoundError, IsADirectoryError: If there is no such file, or it is a folder.
        ValueError: If it is of another encoding.
    """
    require_file(file)
    return decoded(file, Path(file).read_bytes(), encoding)


def blocks_of(text: str, tokenizer: PreTrainedTokenizerBase, length: int, name: str) -> list[list[int]]:
    """Cuts a text into blocks of tokens, one after the other; what is left at the end is dropped.

    Args:
        text (`str`): The text.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        length (`int`): Tokens of a block.
        name (`str`): Name of the text, for the error.

    Raises:
        ValueError: If the text is shorter than a block.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < length:
        raise ValueError(
            f"{name} has {len(ids)} tokens, fewer than a block of {length}. Give a longer text, or a smaller "
            "--block_size."
        )
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def load_blocks(
    texts: tuple[str, str | None], names: tuple[str, str], tokenizer: PreTrainedTokenizerBase, length: int
) -> DatasetDict:
    """Cuts the text to score and train on and that to validate on into blocks.

    Args:
        texts (`tuple[str, str | None]`): Both. Without the second, the last tenth of the first one's blocks.
        names (`tuple[str, str]`): Their names, for errors.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        length (`int`): Tokens of a block.

    Raises:
        ValueError: If a text is too short.
    """
    train = blocks_of(texts[0], tokenizer, length, names[0])
    if texts[1] is not None:
        held_out = blocks_of(texts[1], tokenizer, length, names[1])
    else:
        count = math.ceil(HELD_OUT * len(train))
        train, held_out = train[:-count], train[-count:]
        if not train:
            raise ValueError(
                f"{names[0]} has one block of {length} tokens, and a tenth of the blocks is held out to validate on. "
                "Pass --validation_file, a longer text, or a smaller --block_size."
            )
    splits = {"train": train, "validation": held_out}
    # The labels of a block are its tokens, each of which is predicted by those before it.
    return DatasetDict({split: Dataset.from_dict({"input_ids": b, "labels": b}) for split, b in splits.items()})


def validate_blocks(model: PreTrainedModel, blocks: Dataset) -> None:
    """Tries a trained model on the first blocks.

    Args:
        model (`PreTrainedModel`): The model.
        blocks (`Dataset`): The blocks to validate on.

    Raises:
        ValueError: If its loss is not finite, or higher than that of a model that knows nothing.
    """
    name, ids = model.config.name_or_path, torch.tensor(blocks[:TRIED]["input_ids"], device=model.device)
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=ids).loss.item()
    if not math.isfinite(loss):
        precision = str(model.dtype).removeprefix("torch.")
        hint = "" if precision == "float32" else f" Its weights are in {precision}; pass --dtype float32."
        raise ValueError(f"'{name}' has a loss of {loss} on the validation text.{hint or ' Check its weights.'}")
    if loss > math.log(model.config.vocab_size):
        raise ValueError(
            f"'{name}' has a loss of {loss:.2f} a token on the validation text; one that guesses among its "
            f"{model.config.vocab_size:,} tokens has {math.log(model.config.vocab_size):.2f}. Give the tokenizer that "
            "belongs to the model, and a text of its language. To train a new model, set --num_train_epochs."
        )
