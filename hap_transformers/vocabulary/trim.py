"""Trims the vocabulary of a tokenizer and its model to what texts need."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..components.forwards import eager_model
from ..efficiency import count_parameters
from .cut_model import ids_of_model, keep_ids, parameters_per_id, text_config, vocabulary_tensors
from .ids import ids_in_fields, renumber_fields
from .kinds import KINDS
from .plan import VocabularyPlan
from .tokenizer_json import digest, ids_in_json, read_json, special_tokens, trimmed_backend, whole_texts_backend


logger = logging.get_logger(__name__)

TEXTS_AT_ONCE = 1000
# Models round their embeddings up: Phi-2 and CodeGen have 905 rows more than tokens.
MOST_ROWS_BEYOND = 1024
# A plan warns where fewer tokens stay, or more of the texts' tokens are unknown.
FEWEST_KEPT, MOST_UNKNOWN = 0.1, 0.05


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    keep: Iterable[str | int] = (),
    min_count: int = 1,
) -> VocabularyPlan:
    """Removes tokens that texts do not use from a tokenizer and its model, both in place.

    It is [`plan_vocabulary`] followed by [`apply_vocabulary`].

    Returns:
        `VocabularyPlan`: What was done.

    Raises:
        TypeError, ValueError: As both do; model and tokenizer are then untouched.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
        >>> words = ["[UNK]", "a", "b", "##a", "##b", "##ab", "ab", "ba"]
        >>> pieces = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(pieces), unk_token="[UNK]")
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
        >>> model = BertModel(BertConfig(vocab_size=len(words), **sizes))
        >>> plan = trim_vocabulary(model, tokenizer, ["ab", "abab"])
        >>> plan.kept, tokenizer.tokenize("baab"), model.get_input_embeddings()
        ([0, 1, 2, 3, 4, 5, 6], ['b', '##a', '##ab'], Embedding(7, 8, padding_idx=0))
    """
    plan = plan_vocabulary(model, tokenizer, texts, keep=keep, min_count=min_count)
    apply_vocabulary(model, tokenizer, plan)
    return plan


def plan_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    keep: Iterable[str | int] = (),
    min_count: int = 1,
) -> VocabularyPlan:
    """Decides which tokens of a vocabulary stay; model and tokenizer are only read.

    These stay:

    - tokens that the texts use;
    - what is needed so that no text becomes unknown, and no text of these is split otherwise: single characters (or
      only the bytes, if the tokenizer spells in bytes what it does not know), and for BPE what tokens are merged from;
    - special and added tokens, and all ids that configs name (`bos_token_id`, `forced_decoder_ids`, ...).

    Args:
        model (`PreTrainedModel`): A model with one vocabulary, pruned before or not.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, a fast one of the kind WordPiece, BPE or Unigram.
        texts (`Iterable[str]`): Texts as the model will read them, with prompts, and with targets if it writes.
        keep (`Iterable[str | int]`, *optional*): Further tokens that stay, by their form in the vocabulary or by id:
            words that serve as labels, for example.
        min_count (`int`, *optional*, defaults to 1): How often a token must be in the texts. With more than 1, texts
            with rarer tokens are split into other tokens than before.

    Returns:
        `VocabularyPlan`: The ids that stay, with figures.

    Raises:
        TypeError: If a text is not a string.
        ValueError: If the tokenizer is slow, of another kind or belongs to another model, the texts have no token, a
            token of `keep` does not exist, a character of longer tokens has none of its own, or an embedding cannot be
            cut.
    """
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, not {min_count}.")
    content = read_json(tokenizer)
    _validated_size(eager_model(model), tokenizer)
    kept = _ids_to_keep(keep, tokenizer)
    counts, number = _count_tokens(whole_texts_backend(tokenizer, content), texts)
    return plan_for_ids(model, tokenizer, counts, number, kept, min_count)


def plan_for_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[int],
    number: int,
    keep: Iterable[int] = (),
    min_count: int = 1,
) -> VocabularyPlan:
    """Decides as [`plan_vocabulary`] does, for texts that are tokenized already.

    Args:
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        counts (`Counter[int]`): How often each id is in the texts.
        number (`int`): Number of the texts.
        keep (`Iterable[int]`, *optional*): Further ids that stay.
        min_count (`int`, *optional*, defaults to 1): As in [`plan_vocabulary`].

    Raises:
        ValueError: As [`plan_vocabulary`] does, or if an id is beyond the vocabulary.
    """
    model = eager_model(model)
    content, vocabulary = read_json(tokenizer), tokenizer.get_vocab()
    size = _validated_size(model, tokenizer)
    dims = vocabulary_tensors(model)
    if beyond := [token for token in counts if not 0 <= token < size]:
        raise ValueError(
            f"The texts have the ids {sorted(beyond)[:10]}, but {type(model).__name__} has ids from 0 to {size - 1}. "
            "Tokenize them with the model's own tokenizer. Nothing was changed."
        )
    kept = ids_in_use(model, tokenizer) | set(keep)
    used = {token for token, count in counts.items() if count >= min_count}
    kept |= used
    kind, tokens = KINDS[content["model"]["type"]], {token for token, old in vocabulary.items() if old in kept}
    unknown = kind.unknown(content["model"])
    special = special_tokens(content) | {token for token, old in vocabulary.items() if old == unknown}
    kept |= {vocabulary[token] for token in kind.needed(content["model"], tokens, special)}
    before = count_parameters(model)
    plan = VocabularyPlan(
        kept=sorted(kept),
        size=size,
        kind=content["model"]["type"],
        model_type=model.config.model_type,
        vocabulary=digest(tokenizer),
        counts={
            "texts": number,
            "tokens": counts.total(),
            "unknown": counts[-1 if unknown is None else unknown],
            "used": len(used),
        },
        parameters={"before": before, "after": before - (size - len(kept)) * parameters_per_id(model, dims)},
    )
    _warn(plan)
    return plan


def apply_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: VocabularyPlan) -> None:
    """Removes what a plan does not keep from a tokenizer and its model, both in place, and renumbers the rest.

    Modules stay the same objects. Embeddings, output heads tied and untied, and their biases are replaced by smaller
    ones of the same dtype, device and `requires_grad`: drop any optimizer made before. Ids are renumbered in the
    tokenizer, the config, the config of generation and in modules. Texts that were tokenized before have old ids:
    tokenize them anew, or use [`VocabularyPlan.renumber`].

    Args:
        model (`PreTrainedModel`): The model that the plan was made for.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        plan (`VocabularyPlan`): What stays.

    Raises:
        ValueError: If the plan was made for another model or tokenizer, an id in use would go, or an embedding cannot
            be cut because it is quantized, wrapped by an adapter or shared with another module; model and tokenizer
            are then untouched.
    """
    model = eager_model(model)
    content = read_json(tokenizer)
    size = _validated_size(model, tokenizer)
    if (plan.size, plan.model_type, plan.vocabulary) != (size, model.config.model_type, digest(tokenizer)):
        raise ValueError(
            f"The plan is for a '{plan.model_type}' with {plan.size} ids and the vocabulary '{plan.vocabulary}', but "
            f"{type(model).__name__} is a '{model.config.model_type}' with {size} ids, and its tokenizer has the "
            f"vocabulary '{digest(tokenizer)}'. Make a plan for this model as it is now. Nothing was changed."
        )
    if gone := sorted(ids_in_use(model, tokenizer) - set(plan.kept)):
        raise ValueError(
            f"The plan removes ids that the tokenizer or the model's config use, {gone[:10]}: "
            f"{tokenizer.convert_ids_to_tokens(gone[:10])}. Keep them. Nothing was changed."
        )
    dims, new_ids = vocabulary_tensors(model), plan.new_ids
    backend = trimmed_backend(tokenizer, content, new_ids)

    def renumber(token: int) -> int:
        return new_ids.get(token, token)

    keep_ids(model, dims, plan.kept, renumber)
    renumber_fields(tokenizer, renumber)
    tokenizer._tokenizer = backend
    if "vocab_file" in vars(tokenizer):  # SentencePiece's file, which Transformers 4 would save with the old tokens.
        vars(tokenizer)["vocab_file"] = None


def ids_in_use(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special and added tokens, and those that the model's configs and modules name."""
    size = text_config(model.config).vocab_size
    of_tokenizer = ids_in_json(read_json(tokenizer)) | ids_in_fields([tokenizer]) | set(tokenizer.all_special_ids)
    return ids_of_model(model) | {token for token in of_tokenizer if token is not None and 0 <= token < size}


def _validated_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of the model's ids."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a PreTrainedModel. Trim the model inside, before adapters are added. "
            "Nothing was changed."
        )
    size, tokens = text_config(model.config).vocab_size, max(tokenizer.get_vocab().values()) + 1
    if not tokens <= size <= tokens + MOST_ROWS_BEYOND:
        raise ValueError(
            f"{type(tokenizer).__name__} has {tokens} ids, but {type(model).__name__} has {size}: the tokenizer is "
            "another model's. If it is not, call model.resize_token_embeddings(len(tokenizer)). Nothing was changed."
        )
    return size


def _ids_to_keep(keep: Iterable[str | int], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    if isinstance(keep, str):
        raise ValueError(f"keep must be a list of tokens or ids, not the string {keep!r}.")
    vocabulary, wanted = tokenizer.get_vocab(), list(keep)
    known = vocabulary.keys() | set(vocabulary.values())
    if unknown := [token for token in wanted if token not in known]:
        raise ValueError(
            f"keep names {unknown[:10]}, which {type(tokenizer).__name__} does not have. Name tokens as they stand in "
            "the vocabulary, see tokenizer.tokenize(...), or add words to the texts. Nothing was changed."
        )
    return {vocabulary[token] if isinstance(token, str) else int(token) for token in wanted}


def _count_tokens(backend: Tokenizer, texts: Iterable[str]) -> tuple[Counter[int], int]:
    """How often each id is in the texts, without the special tokens around them, and the number of texts."""
    counts: Counter[int] = Counter()
    number, rest = 0, _strings(texts)
    while part := list(islice(rest, TEXTS_AT_ONCE)):
        for encoding in backend.encode_batch_fast(part, add_special_tokens=False):
            counts.update(encoding.ids)
        number += len(part)
    if not counts:
        raise ValueError(f"The {number} texts have no token. Give texts such as the model will read.")
    return counts, number


def _strings(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings, not one string.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Text {number} is a {type(text).__name__}, not a string; give both texts of a pair.")
        yield text


def _warn(plan: VocabularyPlan) -> None:
    share, unknown = len(plan.kept) / plan.size, plan.counts["unknown"] / plan.counts["tokens"]
    if share < FEWEST_KEPT or unknown > MOST_UNKNOWN:
        logger.warning(
            f"Of {plan.size:,} tokens {len(plan.kept):,} ({share:.1%}) stay. The {plan.counts['texts']:,} texts "
            f"use {plan.counts['used']:,} different tokens, and {unknown:.1%} of all their tokens are unknown. Other "
            "texts will be split into more tokens. Check that these texts are many, and in the model's language."
        )
