"""Sentence encoders and cross-encoders of the Sentence Transformers library: loading, batches, the loss, saving.

This is the only module that knows that library, which is an extra. It is imported when a function here needs it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file, has_file

from .sensitivity.outputs import note_outputs


if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer


Text = str | tuple[str, ...]

MODULES, CONFIG = "modules.json", "config_sentence_transformers.json"
# What the library's config calls the kinds of model that can be pruned. A folder without a name is of the first.
KINDS = ("SentenceTransformer", "CrossEncoder")
WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".ot", ".onnx", ".pt", ".index.json")
# Folders with the weights of the dense model in other forms.
OTHER_WEIGHTS = ("onnx", "openvino", "coreml")


def is_sentence_encoder(name: str) -> bool:
    """Whether a folder or a model on the Hub has the form of the Sentence Transformers library."""
    try:
        return has_file(name, MODULES)
    except (OSError, ValueError):  # There is no such model; what loads it says so.
        return False


def load_sentence_encoder(name: str, device: str | None = None) -> "SentenceTransformer | CrossEncoder":
    """Loads a sentence encoder or a cross-encoder with all modules of its folder, by the library itself.

    Args:
        name (`str`): Hub name or folder, with a `modules.json`.
        device (`str`, *optional*): Where to put it; by default on a GPU if there is one.

    Raises:
        ModuleNotFoundError: If the library is not installed.
        ValueError: If the model is of another kind, does not begin with a transformer, or cannot be loaded.
    """
    try:
        import sentence_transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"'{name}' has a {MODULES}: it is a model of the Sentence Transformers library, which is not installed. "
            "Install the extra: pip install 'hap_transformers[sentence-transformers]'."
        ) from error
    kind = _kind(name)
    if kind not in KINDS:
        raise ValueError(
            f"'{name}' is a {kind}; of the Sentence Transformers library only {' and '.join(KINDS)} can be pruned."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Transformers 4 would make the weights float32.
        encoder = getattr(sentence_transformers, kind)(name, device=device, model_kwargs={"dtype": "auto"})
    except Exception as error:  # Readers of weights raise what they like, and do not name the folder.
        raise ValueError(f"'{name}' cannot be loaded as a {kind}: {error}") from error
    transformer_of(encoder)
    if kind == "CrossEncoder" and len(encoder) > 1:
        names = ", ".join(type(module).__name__ for module in list(encoder)[1:])
        raise ValueError(
            f"The cross-encoder '{name}' is no classifier of pairs: it has the modules {names} behind its "
            "transformer. Only classifiers can be pruned as cross-encoders."
        )
    return encoder.eval()


def _kind(name: str) -> str:
    if not has_file(name, CONFIG):
        return KINDS[0]
    file = cached_file(name, CONFIG)
    return json.loads(Path(str(file)).read_text(encoding="utf-8")).get("model_type", KINDS[0])


def transformer_of(encoder: "SentenceTransformer | CrossEncoder") -> PreTrainedModel:
    """The transformer of an encoder, its first module: the model to score, to prune and to refit.

    Pruning it prunes the encoder, which holds it.

    Raises:
        ValueError: If the first module is not a transformer.
    """
    model = getattr(encoder[0], "auto_model", None)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"The encoder's first module is a {type(encoder[0]).__name__}, not a transformer of this process. Only "
            "encoders that begin with one can be pruned."
        )
    return model


class EmbeddingLoss:
    r"""The loss of a sentence encoder against its own embeddings, as [`SelfLoss`] is that of a model without a head.

    It is the squared distance of the embedding to itself, summed over its dimensions. The embedding is that of the
    whole encoder: pooling, dense layers and normalization as its modules say, after the transformer that is scored.

    Args:
        encoder (`SentenceTransformer`): The encoder whose transformer is scored.
        prompt (`str`, *optional*): What is put before each text. By default the encoder's default prompt.

    Raises:
        ValueError: If the encoder's first module is not a transformer whose `forward` gives the embeddings of tokens;
            when it is called, if its modules give no embedding.

    Example:

    ```python
    encoder = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
    batches = encoder_batches(encoder, texts)
    sensitivity = estimate_sensitivity(transformer_of(encoder), batches, loss_fn=EmbeddingLoss(encoder))
    ```
    """

    def __init__(self, encoder: "SentenceTransformer", prompt: str | None = None):
        transformer_of(encoder)
        self.encoder: Any = encoder
        features: Any = encoder.preprocess(["text"], prompt=_prompt(encoder, prompt))
        # The modality, and how many tokens the prompt has, which some poolings leave out.
        self.beside = {name: value for name, value in features.items() if not isinstance(value, torch.Tensor)}
        first: Any = encoder[0]
        call = first.modality_config[self.beside.get("modality", "text")]
        if call["method"] != "forward":
            raise ValueError(f"The encoder calls '{call['method']}' of its transformer; only 'forward' can be scored.")
        path = call["method_output_name"]
        self.path = (path,) if isinstance(path, str) else tuple(path or ())

    def __call__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        """Runs a model on a batch, and returns the batch's mean loss with its graph."""
        embedding = self.embedding(model, inputs)
        loss = (embedding - embedding.detach()).square().sum(-1).mean()
        return note_outputs(loss, [embedding])

    def embedding(self, model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
        """The embeddings of a batch by a model in the place of the encoder's transformer.

        Args:
            model (`PreTrainedModel`): The encoder's transformer, or another such as the dense one.
            inputs (`dict[str, Any]`): A batch of [`encoder_batches`]. What is no tensor is for the other modules.

        Returns:
            `torch.Tensor`: Shape `(texts, features)`.
        """
        first, *others = self.encoder
        outputs: Any = model(**_tensors(inputs))
        tokens = outputs
        for name in self.path:
            tokens = tokens[name]
        features: Any = {**self.beside, **inputs, first.module_output_name: tokens}
        if getattr(outputs, "hidden_states", None) is not None:
            features["all_layer_embeddings"] = outputs.hidden_states
        with _in_evaluation(others):
            for module in others:
                features = module(features)
        if "sentence_embedding" not in features:
            names = ", ".join(type(module).__name__ for module in self.encoder)
            raise ValueError(f"The encoder's modules ({names}) give no 'sentence_embedding', so it has no such loss.")
        return features["sentence_embedding"]


def encoder_batches(
    encoder: "SentenceTransformer | CrossEncoder",
    texts: Sequence[Text],
    batch_size: int = 32,
    prompt: str | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Batches of texts for scoring and refitting an encoder's transformer.

    Args:
        encoder (`SentenceTransformer` or `CrossEncoder`): It tokenizes the texts and cuts them to its maximal length.
        texts (`Sequence[str]` or `Sequence[tuple[str, str]]`): Texts, or pairs of texts for a cross-encoder.
        batch_size (`int`, *optional*, defaults to 32): Texts per batch.
        prompt (`str`, *optional*): What is put before each text. By default the encoder's default prompt.

    Returns:
        `list[dict[str, torch.Tensor]]`: Inputs of the transformer; each tensor `(texts, tokens)`.
    """
    parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    return [encoder_inputs(encoder, part, prompt) for part in parts]


def encoder_inputs(
    encoder: "SentenceTransformer | CrossEncoder", texts: Sequence[Text], prompt: str | None = None
) -> dict[str, torch.Tensor]:
    """One batch of [`encoder_batches`]."""
    inputs: Any = list(texts)
    return _tensors(encoder.preprocess(inputs, prompt=_prompt(encoder, prompt)))


def _tensors(features: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What the transformer takes of the features of texts."""
    return {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}


def save_sentence_encoder(encoder: "SentenceTransformer | CrossEncoder", name: str, folder: str | Path) -> None:
    """Saves an encoder with a pruned transformer, and all other files as they are where it was loaded from.

    The tokenizer's files are written anew if the vocabulary has another size than there ([`trim_vocabulary`]).

    `encoder.save_pretrained(folder)` does the same for an encoder whose other modules were changed, too; it writes
    their files anew, in the form of the installed release.

    Args:
        encoder (`SentenceTransformer` or `CrossEncoder`): The encoder.
        name (`str`): Hub name or folder that it was loaded from.
        folder (`str` or `Path`): Where to write.
    """
    source, folder = Path(name), Path(folder)
    if not source.is_dir():
        ignored = [f"{other}/*" for other in OTHER_WEIGHTS] + ["model*.safetensors", "pytorch_model*.bin"]
        source = Path(snapshot_download(name, ignore_patterns=ignored))
    place, model = transformer_folder(source), transformer_of(encoder)
    config = json.loads((source / place / "config.json").read_text(encoding="utf-8"))
    resized = config.get("vocab_size") != getattr(model.config, "vocab_size", None)
    vocabulary = set(encoder.tokenizer.vocab_files_names.values()) if resized else set()
    replaced = _replaced(source, place, folder.resolve(), vocabulary)
    shutil.copytree(source, folder, ignore=replaced, dirs_exist_ok=True)
    model.save_pretrained(folder / place)
    if resized:
        encoder.tokenizer.save_pretrained(folder / place)


def transformer_folder(folder: str | Path) -> str:
    """Where a folder of the library holds its transformer: `""` for the folder itself, or such as `0_Transformer`."""
    modules = json.loads((Path(folder) / MODULES).read_text(encoding="utf-8"))
    return modules[0]["path"]


def _replaced(source: Path, place: str, destination: Path, vocabulary: set[str]) -> Any:
    """What a copy of a folder leaves out: the dense transformer's weights in any form, its card, hidden files.

    Files of the vocabulary are named where they are left out, too.
    """

    def ignored(folder: str, names: list[str]) -> list[str]:
        here = Path(folder)
        left_out = {name for name in names if name.startswith(".") or (here / name).resolve() in destination.parents}
        if here == source:
            left_out |= {"README.md", *OTHER_WEIGHTS}
        if here == source / place:
            left_out |= {name for name in names if name.endswith(WEIGHTS)} | {*OTHER_WEIGHTS} | vocabulary
        return list(left_out)

    return ignored


def _prompt(encoder: "SentenceTransformer | CrossEncoder", prompt: str | None) -> str | None:
    """The prompt that the encoder itself would put before texts."""
    return encoder.prompts.get(encoder.default_prompt_name or "") if prompt is None else prompt


@contextmanager
def _in_evaluation(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Switches dropout off, as scoring does in the transformer itself."""
    training = [part for module in modules for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def is_cross_encoder(config: PretrainedConfig) -> bool:
    """Whether the library saved a classifier as a cross-encoder, which reads pairs of texts."""
    return any(
        getattr(config, name, None) is not None
        for name in ("sentence_transformers", "sbert_ce_default_activation_function")
    )
