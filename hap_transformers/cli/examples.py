"""The examples that the commands score, refit and compare on: a task's, or texts without labels."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import typer
from torch.utils.data import DataLoader, Subset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..data.tasks import Task, load_task
from ..data.texts import Text, read_texts
from ..data.tokenizers import cut_note, longest_text, set_padding, validate_tokens
from ..refit.examples import refit_batches
from ..sensitivity.batches import shifts_labels
from ..sensitivity.self_loss import needs_decoded
from ..sentence_encoders import encoder_inputs
from .loading import LENGTH, Loaded
from .options import Source


# A tenth of the examples is compared on, but no more than give a stable figure.
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 1000


@dataclass
class Examples:
    """Examples in the order in which they are drawn, and others that are held out.

    Args:
        rows (`Subset`): What may be scored and refitted on.
        held_out (`Subset`): What is compared on.
        collate (`Callable`): Makes a batch of a list of examples.
        batch (`int`): Examples per batch.
        task (`Task`, *optional*): The task, if the examples have labels.
    """

    rows: Subset
    held_out: Subset
    collate: Callable[[list[Any]], Any]
    batch: int
    task: Task | None = None

    def scored(self, count: int) -> DataLoader:
        """Batches of the first examples."""
        return self._batches(Subset(self.rows, range(min(count, len(self.rows)))))

    def refitted(self, loaded: Loaded, most: int, least: int) -> Iterator[dict[str, Any]]:
        """Batches to refit on: the first examples, as many as [`refit_batches`] takes."""
        return refit_batches(self.scored(max(most, least)), most, least, shifts_labels(loaded.model))

    def compared(self) -> DataLoader:
        """Batches of the examples that were held out."""
        return self._batches(self.held_out)

    def _batches(self, rows: Subset) -> DataLoader:
        return DataLoader(rows, batch_size=self.batch, collate_fn=self.collate)


def load_examples(loaded: Loaded, source: Source, most: int, hold_out: bool = False, trim: bool = False) -> Examples:
    """Loads the examples that the options name.

    Args:
        loaded (`Loaded`): The model, with its tokenizer where it came from.
        source (`Source`): The options.
        most (`int`): How many examples will be used at most.
        hold_out (`bool`, *optional*, defaults to `False`): Whether to set examples aside to compare models on: the
            validation split of a GLUE task, or else a tenth, at most 1,000.
        trim (`bool`, *optional*, defaults to `False`): Whether to trim the vocabulary to all given texts before, of a
            task to those of its training split.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If no examples are named, a file cannot be read or holds too few texts, or they do not suit the
            model or its tokenizer.
    """
    if loaded.model.main_input_name != "input_ids":
        raise ValueError(
            f"'{loaded.name}' reads '{loaded.model.main_input_name}', not texts, and this command has data for models "
            "of texts only. Choose a --method that needs none (magnitude, random), or prune in Python by "
            "estimate_sensitivity, plan_pruning, apply_plan and reconstruct; vision_scripts/run_image_hap.py does so "
            "for image classifiers."
        )
    if needs_decoded(loaded.model):
        raise ValueError(
            f"'{loaded.name}' is a {type(loaded.model).__name__}, which needs something to decode, and this command "
            "makes batches without `labels`. Prune it with HapTrainer or in Python, on batches with `labels` "
            "(docs/how_to/seq2seq.md), or by a --method that needs no data (magnitude, random)."
        )
    if type(loaded.model).__name__.endswith("ForMultipleChoice"):
        raise ValueError(
            f"'{loaded.name}' is a {type(loaded.model).__name__}, which reads several texts for one answer, and this "
            "command gives it one. Prune it with HapTrainer or in Python, on batches of its own."
        )
    if source.texts:
        return _of_texts(loaded, source, most, hold_out, trim)
    if not (source.task or source.train_file):
        raise ValueError(
            "No data are named; pass --task with a GLUE task, --train-file with a custom file, or --texts."
        )
    return _of_task(loaded, source, hold_out, trim)


def _drawn(rows: Any, seed: int, hold_out: bool) -> tuple[Subset, Subset]:
    """All rows in a random order, the last of them held out."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(max(1, int(HELD_OUT_SHARE * len(rows))), MOST_HELD_OUT) if hold_out else 0
    cut = len(rows) - held_out
    return Subset(rows, order[:cut]), Subset(rows, order[cut:])


def _of_texts(loaded: Loaded, source: Source, most: int, hold_out: bool, trim: bool) -> Examples:
    model, pairs = loaded.model, len(source.column or ()) == 2
    if loaded.kind == "CrossEncoder" and not pairs:
        raise ValueError(
            f"'{loaded.name}' is a cross-encoder, which reads pairs of texts. Name the two columns of a table: "
            "--column query --column passage."
        )
    if loaded.kind == "SentenceTransformer" and pairs:
        raise ValueError(f"'{loaded.name}' is a sentence encoder, which reads single texts. Name one --column.")
    texts = read_texts(source.texts or (), source.column or (), source.encoding)
    if trim:
        loaded.trim(chain.from_iterable(_columns(texts)))
    rows, held_out = _drawn(texts, source.seed, hold_out)
    if loaded.encoder is None:
        tokenizer, kept = _fitted_tokenizer(loaded, source.length, pairs)
        settings = {"truncation": True, "max_length": kept, "padding": True, "return_tensors": "pt"}

        def collate(part: list[Text]) -> Any:
            return tokenizer(*_columns(part), **settings)
    else:
        tokenizer, kept = _encoder_tokenizer(loaded, source.length, pairs)

        def collate(part: list[Text]) -> Any:
            return encoder_inputs(loaded.encoder, part)

    used = [rows[i] for i in range(min(most, len(rows)))] + [held_out[i] for i in range(len(held_out))]
    ids = tokenizer(*_columns(used), truncation=False, verbose=False)["input_ids"]
    validate_tokens({"texts": {"input_ids": ids}}, tokenizer, model)
    if cut := sum(len(tokens) > kept for tokens in ids):
        typer.echo(f"hap: {cut} of {len(ids)} texts have more than {kept} tokens and are cut.", err=True)
    return Examples(rows, held_out, collate, source.batch)


def _columns(texts: Sequence[Text]) -> list[list[str]]:
    """Single texts as one list, pairs as two."""
    rows = [(text,) if isinstance(text, str) else text for text in texts]
    return [list(column) for column in zip(*rows, strict=True)]


def _fitted_tokenizer(loaded: Loaded, length: int | None, pairs: bool = False) -> tuple[PreTrainedTokenizerBase, int]:
    """A model's tokenizer, and how many tokens a text may have, which is reported if it is fewer than asked for."""
    tokenizer = copy.deepcopy(loaded.tokenizer)  # The one that is saved keeps its padding.
    set_padding(tokenizer, loaded.model)
    return tokenizer, _kept(loaded, tokenizer, length or LENGTH, pairs)


def _encoder_tokenizer(loaded: Loaded, length: int | None, pairs: bool) -> tuple[PreTrainedTokenizerBase, int]:
    """An encoder's tokenizer, and its maximal length, which is made smaller if that is asked for."""
    encoder, tokenizer = loaded.encoder, loaded.encoder.tokenizer
    kept = _kept(loaded, tokenizer, length or longest_text(loaded.model, tokenizer), pairs)
    if kept < longest_text(loaded.model, tokenizer):
        encoder.max_seq_length = kept
    return tokenizer, kept


def _kept(loaded: Loaded, tokenizer: PreTrainedTokenizerBase, length: int, pairs: bool) -> int:
    kept, note = cut_note(loaded.model, tokenizer, length, pair=pairs)
    if note:
        typer.echo(f"hap: {note}", err=True)
    return kept


def _of_task(loaded: Loaded, source: Source, hold_out: bool, trim: bool) -> Examples:
    """Training examples of the task that a model was fine-tuned for."""
    name, model = loaded.name, loaded.model
    if source.encoding and not source.train_file:
        raise ValueError("--encoding is that of --train-file; pass one.")
    if not type(model).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"'{name}' is a {type(model).__name__}, not a model that was fine-tuned to classify texts: it has no loss "
            "on this task. Pass --texts, which needs no labels, fine-tune it first, or score it in Python with a "
            "custom loss (`loss_fn`)."
        )
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        raise ValueError(f"'{name}' is for {problem}: a text may have several labels, which tasks here do not have.")
    file = source.train_file
    task = load_task(source.task, source.data_dir, file, file, source.encoding).aligned_with(model.config)
    if trim:
        loaded.trim(text for column in task.texts for text in task.data["train"][column])
    tokenizer, kept = _fitted_tokenizer(loaded, source.length, pairs=len(task.texts) == 2)
    data = task.tokenize(tokenizer, kept)
    validate_tokens(data, tokenizer, model)
    collate = DataCollatorWithPadding(tokenizer)
    rows, held_out = _drawn(data["train"], source.seed, hold_out and source.task is None)
    if hold_out and source.task is not None:
        validation, _ = _drawn(data["validation"], source.seed, False)
        held_out = Subset(validation, range(min(MOST_HELD_OUT, len(validation))))
    return Examples(rows, held_out, collate, source.batch, task)
