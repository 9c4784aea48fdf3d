"""What the commands load: models, tokenizers and training examples."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import datasets
import torch
import transformers
import typer
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from ..data.calibration import calibration_batches
from ..data.tasks import load_task
from ..data.texts import read_texts
from ..data.tokenizers import cut_note, load_tokenizer, longest_text, set_padding, validate_tokens


LENGTH = 128


def load_model(name: str, device: str | None = None) -> PreTrainedModel:
    """Loads a model of the class that its config names.

    Args:
        name (`str`): Hub name or folder.
        device (`str`, *optional*): Where to put it; by default on a GPU if there is one.

    Raises:
        FileNotFoundError: If there is no such model.
        RuntimeError: If there is no such device.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise FileNotFoundError(
            f"There is no folder '{name}', nor a model of that name on the Hub: {error}"
        ) from error
    known = [class_name for class_name in config.architectures or () if hasattr(transformers, class_name)]
    model_class = getattr(transformers, known[0]) if known else transformers.AutoModel
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model_class.from_pretrained(name)
    except Exception as error:  # Readers of weights raise what they like, and do not name the file.
        raise ValueError(f"'{name}' cannot be loaded as a {model_class.__name__}: {error}") from error
    return model.to(device).eval()


def chosen_length(length: int | None, *models: PreTrainedModel) -> int:
    """Tokens per text: those asked for, or else 128 or as many as the models take, which is reported.

    Raises:
        ValueError: If more were asked for than a model takes.
    """
    limit, name = min((longest_text(model), type(model).__name__) for model in models)
    if limit >= (length or LENGTH):
        return length or LENGTH
    if length is not None:
        raise ValueError(f"{name} takes at most {limit} tokens, not {length}; pass --length {limit}.")
    typer.echo(f"hap: {name} takes at most {limit} tokens; --length is {limit}, not {LENGTH}.", err=True)
    return limit


def saved_tokenizer(name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model, or `None` if it has none or does not take texts."""
    if model.main_input_name == "input_ids":
        with suppress(ValueError):
            return load_tokenizer(name)
    return None


def validate_one_source(
    task_name: str | None,
    data_dir: str | None,
    train_file: str | None,
    texts: Sequence[str] | None,
    column: str | None,
) -> None:
    """Checks that at most one source of examples is named.

    Raises:
        ValueError: If there are several, or a folder without a task or a column without texts.
    """
    named = {"--task": task_name, "--train-file": train_file, "--texts": texts}
    given = [flag for flag, value in named.items() if value]
    if len(given) > 1:
        raise ValueError(f"Pass either {' or '.join(given)}, not {'both' if len(given) == 2 else 'all'}.")
    if data_dir and not task_name:
        raise ValueError("--data-dir needs --task.")
    if column and not texts:
        raise ValueError("--column is that of --texts; pass a file.")


def text_batches(
    name: str,
    model: PreTrainedModel,
    texts: Sequence[str],
    column: str | None,
    max_examples: int,
    batch: int,
    length: int | None,
    seed: int,
    encoding: str | None = None,
) -> DataLoader:
    """Texts without labels, for models that read texts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file cannot be read or holds too few texts, or the model has no tokenizer or reads no texts.
    """
    if model.main_input_name != "input_ids":
        raise ValueError(f"'{name}' reads '{model.main_input_name}', not texts; --texts is for models of texts.")
    rows = Dataset.from_dict({"text": read_texts(texts, column, encoding)})
    tokenizer, kept = _fitted_tokenizer(name, model, length)
    tokenized = rows.map(
        lambda part: tokenizer(part["text"], truncation=True, max_length=kept),
        batched=True,
        remove_columns=["text"],
        desc="Tokenizing texts",
    )
    validate_tokens(DatasetDict(texts=tokenized), tokenizer, model)
    return calibration_batches(tokenized, max_examples, seed, batch, DataCollatorWithPadding(tokenizer))


def _fitted_tokenizer(
    name: str, model: PreTrainedModel, length: int | None, pair: bool = False
) -> tuple[PreTrainedTokenizerBase, int]:
    """A model's tokenizer, and how many tokens a text may have, which is reported if it is fewer than asked for."""
    tokenizer = load_tokenizer(name)
    set_padding(tokenizer, model)
    kept, note = cut_note(model, tokenizer, length or LENGTH, pair=pair)
    if note:
        typer.echo(f"hap: {note}", err=True)
    return tokenizer, kept


def training_batches(
    name: str,
    model: PreTrainedModel,
    task_name: str | None,
    data_dir: str | None,
    train_file: str | None,
    max_examples: int,
    batch: int,
    length: int | None,
    seed: int,
    encoding: str | None = None,
) -> DataLoader:
    """Training examples of the task that a model was fine-tuned for.

    Raises:
        ValueError: If no data are named, options contradict each other, the model is no classifier, does not fit the
            task, or has no tokenizer.
    """
    if not (task_name or train_file):
        raise ValueError(
            "No data are named; pass --task with a GLUE task, --train-file with a custom file, or --texts."
        )
    if encoding and not train_file:
        raise ValueError("--encoding is that of --train-file; pass one.")
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"'{name}' is a {type(model).__name__}, not a model that was fine-tuned to classify texts: it has no loss "
            "on this task. Fine-tune it first, or score it in Python with a custom loss (`loss_fn`)."
        )
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        raise ValueError(f"'{name}' is for {problem}: a text may have several labels, which tasks here do not have.")
    task = load_task(task_name, data_dir, train_file, train_file, encoding).aligned_with(model.config)
    tokenizer, kept = _fitted_tokenizer(name, model, length, pair=len(task.texts) == 2)
    rows = task.tokenize(tokenizer, kept)
    validate_tokens(rows, tokenizer, model)
    return calibration_batches(rows["train"], max_examples, seed, batch, DataCollatorWithPadding(tokenizer))
