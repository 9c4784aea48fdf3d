"""Trims the vocabulary of a trainer's model and tokenizer to its data sets, and renumbers these."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..vocabulary.plan import VocabularyPlan
from ..vocabulary.trim import apply_vocabulary, plan_for_ids


logger = logging.get_logger(__name__)

IDS = "input_ids"
REMEDY = "Set trim_vocabulary=False, and call trim_vocabulary(model, tokenizer, texts) before you tokenize."


def trim_to_data_sets(trainer: Any, model: PreTrainedModel, teacher: Any) -> VocabularyPlan:
    """Removes tokens that a trainer's data sets do not use from its model and its tokenizer, both in place.

    The trainer's data sets are replaced by ones with the new ids. Those of the evaluation stay, too: how a token that
    is gone would be split is not known without its text.

    Args:
        trainer (`HapTrainerMixin`): The trainer, before it has trained.
        model (`PreTrainedModel`): Its model.
        teacher (`PreTrainedModel`, *optional*): A teacher that was given.

    Returns:
        `VocabularyPlan`: What was done.

    Raises:
        ValueError: If there is no tokenizer, the collator has another one, model, optimizer or teacher would not fit
            any more, the model predicts tokens, or a data set has no tokens; nothing is changed then.
    """
    tokenizer = _tokenizer(trainer)
    _validate_model(trainer, model, teacher)
    train, given = trainer.train_dataset, trainer.eval_dataset
    named = given if isinstance(given, dict) else {} if given is None else {"eval_dataset": given}
    for name, rows in (("train_dataset", train), *named.items()):
        _validate_rows(name, rows)
    plan = plan_for_ids(model, tokenizer, *_counts([train, *named.values()]))
    apply_vocabulary(model, tokenizer, plan)
    trainer.train_dataset = _renumbered(train, plan)
    renumbered = {name: _renumbered(rows, plan) for name, rows in named.items()}
    trainer.eval_dataset = renumbered if isinstance(given, dict) else renumbered.get("eval_dataset")
    logger.warning(
        f"The vocabulary was trimmed to {len(plan.kept):,} of {plan.size:,} tokens, and the trainer's data sets were "
        "renumbered. Other data that was tokenized before has old ids: tokenize it anew, or renumber it by "
        "trainer.vocabulary_plan.renumber."
    )
    return plan


def _tokenizer(trainer: Any) -> PreTrainedTokenizerBase:
    tokenizer = trainer.processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        given = "has none" if tokenizer is None else f"has a {type(tokenizer).__name__}"
        raise ValueError(
            f"trim_vocabulary=True trims the tokenizer with the model, and the trainer {given}. Pass "
            "processing_class=tokenizer."
        )
    if getattr(trainer.data_collator, "tokenizer", tokenizer) is not tokenizer:
        raise ValueError(
            "trim_vocabulary=True trims the tokenizer that is given as processing_class, but data_collator has "
            "another one, whose ids would be old. Make the collator with the same tokenizer."
        )
    return tokenizer


def _validate_model(trainer: Any, model: PreTrainedModel, teacher: Any) -> None:
    name = type(model).__name__
    if model.get_output_embeddings() is not None:
        raise ValueError(f"trim_vocabulary=True is for models that read tokens, but {name} predicts some. {REMEDY}")
    given = {"model_init": trainer.model_init, "a teacher": teacher, "optimizers": trainer.optimizer}
    if others := [what for what, value in given.items() if value is not None]:
        raise ValueError(
            f"trim_vocabulary=True changes the ids of {name} when the trainer is made, and {others[0]} would not fit "
            f"any more. {REMEDY}"
        )


def _validate_rows(name: str, rows: Any) -> None:
    columns = rows.column_names if isinstance(rows, Dataset) else []
    if IDS not in columns:
        found = f"a Dataset of {', '.join(columns)}" if columns else f"a {type(rows).__name__}"
        raise ValueError(
            f"trim_vocabulary=True renumbers the {IDS} of data sets of the datasets library, but {name} is {found}. "
            f"{REMEDY}"
        )
    if not len(rows):
        raise ValueError(f"trim_vocabulary=True keeps the tokens of data sets, and {name} has no rows. {REMEDY}")
    ids = rows.with_format(None)[0][IDS]
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise ValueError(
            f"trim_vocabulary=True renumbers {IDS} that are a list of whole numbers a row, and the first of {name} is "
            f"{str(ids)[:60]}. {REMEDY}"
        )


def _counts(data_sets: Sequence[Dataset]) -> tuple[Counter[int], int]:
    """How often tokens are in data sets, and the number of their texts."""
    counts: Counter[int] = Counter()
    for rows in data_sets:
        for part in rows.with_format(None).select_columns(IDS).iter(1000):
            for ids in part[IDS]:
                counts.update(ids)
    return counts, sum(map(len, data_sets))


def _renumbered(rows: Dataset, plan: VocabularyPlan) -> Dataset:
    """A data set with new ids, in the same format."""
    settings = rows.format
    plain = rows.with_format(None).map(
        lambda part: {IDS: [plan.renumber(ids) for ids in part[IDS]]}, batched=True, desc="Renumbering tokens"
    )
    return plain.with_format(settings["type"], columns=settings["columns"], **settings["format_kwargs"])
