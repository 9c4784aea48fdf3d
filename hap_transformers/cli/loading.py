"""What the commands load: models, alone or within an encoder of the Sentence Transformers library."""

import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import typer
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, has_file

from ..checkpoints.remote_code import PREFIX
from ..data.tokenizers import load_tokenizer, longest_text
from ..reporting.card import loader_of
from ..reporting.fidelity import Embed
from ..sensitivity.self_loss import SelfLoss, head_of
from ..sentence_encoders import (
    EmbeddingLoss,
    is_cross_encoder,
    is_sentence_encoder,
    load_sentence_encoder,
    save_sentence_encoder,
    transformer_of,
)
from ..vocabulary.plan import VocabularyPlan
from ..vocabulary.trim import trim_vocabulary
from .errors import warn


LENGTH = 128
# The file of PEFT beside an adapter's weights.
ADAPTER = "adapter_config.json"


@dataclass
class Loaded:
    """A model, and the encoder of the Sentence Transformers library that it is part of.

    Args:
        name (`str`): Hub name or folder.
        model (`PreTrainedModel`): The model that is scored and pruned.
        encoder (`SentenceTransformer` or `CrossEncoder`, *optional*): What it is the transformer of.
        kind (`str`, *optional*): Class of that library that loads the folder; `""` if Transformers does.
        self_loss (`SelfLoss`, *optional*): The loss of a model without a head, if its embeddings are not made as by
            default.
        vocabulary (`VocabularyPlan`, *optional*): What was trimmed.
    """

    name: str
    model: PreTrainedModel
    encoder: Any = None
    kind: str = ""
    self_loss: SelfLoss | None = None
    vocabulary: VocabularyPlan | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The encoder's tokenizer, or that of the model's folder.

        Raises:
            ValueError: If there is none.
        """
        return load_tokenizer(self.name) if self.encoder is None else self.encoder.tokenizer

    def trim(self, texts: Iterable[str]) -> None:
        """Removes tokens that texts, and an encoder's prompts, do not use.

        Raises:
            ValueError: As [`trim_vocabulary`] does.
        """
        prompts = [] if self.encoder is None else self.encoder.prompts.values()
        self.vocabulary = trim_vocabulary(self.model, self.tokenizer, chain(texts, prompts))

    @cached_property
    def _encoder_loss(self) -> EmbeddingLoss | None:
        return EmbeddingLoss(self.encoder) if self.kind == "SentenceTransformer" else None

    @property
    def loss_fn(self) -> EmbeddingLoss | SelfLoss | None:
        """The loss of embeddings; `None` where the model's own loss or its self loss is right."""
        return self._encoder_loss or self.self_loss

    @property
    def embed(self) -> Embed | None:
        """Makes embeddings of a batch by a model in this one's place; `None` where the default does."""
        if self._encoder_loss is not None:
            return self._encoder_loss.embedding
        loss = self.self_loss
        return None if loss is None else lambda model, inputs: loss.embedding(model, model(**inputs), inputs)

    @property
    def loader(self) -> str:
        """The class that loads the folder, with its package."""
        return f"sentence_transformers.{self.kind}" if self.kind else loader_of(self.model)

    def save(self, folder: Path) -> None:
        """Saves the model with its tokenizer or processor, or the whole encoder with all its files."""
        if self.encoder is not None:
            save_sentence_encoder(self.encoder, self.name, folder)
            return
        self.model.save_pretrained(folder)
        if self.model.main_input_name == "input_ids":
            with suppress(ValueError):  # It has none.
                self.tokenizer.save_pretrained(folder)
            return
        try:
            AutoProcessor.from_pretrained(self.name).save_pretrained(folder)
        except ImportError as error:
            warn(f"The processor of '{self.name}' was not saved: {error}")
        except (OSError, ValueError):  # It has none.
            pass


def load(name: str, device: str | None = None, self_loss: SelfLoss | None = None) -> Loaded:
    """Loads a model of the class that its config names, or an encoder of the Sentence Transformers library.

    Args:
        name (`str`): Hub name or folder.
        device (`str`, *optional*): Where to put it; by default on a GPU if there is one.
        self_loss (`SelfLoss`, *optional*): For a model without a head, how its embeddings are made.

    Raises:
        FileNotFoundError: If there is no such model.
        ModuleNotFoundError: If it is of the Sentence Transformers library, which is not installed.
        ValueError: If it cannot be loaded, is an adapter of PEFT, or its embeddings are not for `self_loss` to choose.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if Path(name).is_file():
        raise ValueError(f"'{name}' is a file; name the folder of a model, or a model on the Hub.")
    if is_sentence_encoder(name):
        if self_loss is not None:
            raise ValueError(f"'{name}' says itself how it pools: leave out --pooling and --no-normalize.")
        encoder = load_sentence_encoder(name, device)
        return Loaded(name, transformer_of(encoder).eval(), encoder, type(encoder).__name__)
    if _is_adapter(name):
        raise ValueError(
            f"'{name}' is an adapter of PEFT. Load it with its model, merge both (`merge_and_unload()`), save the "
            "result and give that folder."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise FileNotFoundError(
            f"There is no folder '{name}', nor a model of that name on the Hub: {error}"
        ) from error
    model_class = _model_class(name, config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model_class.from_pretrained(name, dtype="auto")  # Transformers 4 would make it float32.
    except Exception as error:  # Readers of weights raise what they like, and do not name the file.
        raise ValueError(f"'{name}' cannot be loaded as a {model_class.__name__}: {error}") from error
    if self_loss is not None and head_of(model) not in (None, "Model"):
        raise ValueError(
            f"'{name}' is a {model_class.__name__}, which has a head: --pooling and --no-normalize are for models "
            "without one."
        )
    kind = "CrossEncoder" if is_cross_encoder(config) else ""
    return Loaded(name, model.to(device).eval(), kind=kind, self_loss=self_loss)


def _model_class(name: str, config: transformers.PretrainedConfig) -> Any:
    """The class that a config names; without a name, the class without a head.

    Raises:
        ValueError: If Transformers does not have it.
    """
    # Exported code saves its own classes.
    named = [class_name.removeprefix(PREFIX) for class_name in config.architectures or ()]
    known = [class_name for class_name in named if hasattr(transformers, class_name)]
    if named and not known:
        raise ValueError(
            f"'{name}' is of the class {named[0]}, which Transformers {transformers.__version__} does not have. Load "
            "and prune it in Python, by HapTrainer or apply_plan."
        )
    return getattr(transformers, known[0]) if known else transformers.AutoModel


def _is_adapter(name: str) -> bool:
    """Whether a folder or a model on the Hub is an adapter without a model."""
    with suppress(OSError, ValueError):  # There is no such model; what loads it says so.
        return has_file(name, ADAPTER) and not has_file(name, CONFIG_NAME)
    return False


def load_model(name: str, device: str | None = None) -> PreTrainedModel:
    """Loads a model as [`load`] does, of an encoder its transformer."""
    return load(name, device).model


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


def size_in_words(model: PreTrainedModel, length: int, batch: int | None = None) -> str:
    """The size of a batch of tokens, or of what else a model reads; of several batches if `batch` is `None`."""
    if model.main_input_name != "input_ids":
        return "batches" if batch is None else f"a batch of {batch}"
    return f"batches of {length} tokens" if batch is None else f"{batch} x {length} tokens"
