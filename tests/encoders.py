"""Tiny models of the Sentence Transformers library, in folders that it wrote, and texts for them."""

import json
import shutil
from pathlib import Path

import torch
from script_inputs import save_model
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tiny import make_model
from transformers import AutoTokenizer, T5Config, T5EncoderModel
from zoo import HIDDEN


WORDS = ["good film", "bad plot", "a good plot", "b bad film here", "c d e film", "plot plot good"]
TEXTS = [f"{WORDS[i % len(WORDS)]} {'abcdefghij'[i % 10]} {'klmn'[i % 4]}" for i in range(40)]
PAIRS = [(text, TEXTS[-i]) for i, text in enumerate(TEXTS)]


def save_transformer(folder: Path, **sizes) -> Path:
    """The folder of a tiny BERT classifier with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(save_model(folder))
    tokenizer.model_max_length = 32
    place = folder / "transformer"
    model = make_model(vocab_size=40, dtype=torch.float32, **sizes)
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.bias"):  # What all texts' embeddings have in common.
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def save_encoder(folder: Path, pooling="mean", dense: bool = False, normalize: bool = True, **settings) -> Path:
    """The folder of a tiny sentence encoder."""
    torch.manual_seed(0)
    first = Transformer(str(save_transformer(folder)), max_seq_length=16)
    width = HIDDEN * (1 if isinstance(pooling, str) else len(pooling))
    include_prompt = settings.pop("include_prompt", True)
    modules = [first, Pooling(width if isinstance(pooling, str) else HIDDEN, pooling, include_prompt=include_prompt)]
    modules += [Dense(width, 5)] * dense + [Normalize()] * normalize
    encoder = SentenceTransformer(modules=modules, device="cpu", **settings)
    encoder.save_pretrained(str(folder / "encoder"), create_model_card=False)
    return folder / "encoder"


def save_t5_encoder(folder: Path) -> Path:
    """The folder of a tiny sentence encoder that begins with the encoder of a T5, as Sentence-T5 does."""
    torch.manual_seed(0)
    inputs = ["input_ids", "attention_mask"]  # A T5 has no types of tokens.
    tokenizer = AutoTokenizer.from_pretrained(save_model(folder), model_input_names=inputs)
    place = folder / "transformer"
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    T5EncoderModel(T5Config(**sizes, pad_token_id=tokenizer.pad_token_id)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    modules = [Transformer(str(place), max_seq_length=16), Pooling(32, "mean"), Dense(32, 5), Normalize()]
    encoder = SentenceTransformer(modules=modules, device="cpu")
    encoder.save_pretrained(str(folder / "encoder"), create_model_card=False)
    return folder / "encoder"


def in_a_subfolder(encoder: Path) -> Path:
    """A copy of an encoder's folder in the layout of early releases: the transformer in a folder of its own."""
    old = encoder.with_name("old")
    (old / "0_Transformer").mkdir(parents=True)
    for file in encoder.iterdir():
        if file.is_dir() or file.name in ("modules.json", "config_sentence_transformers.json"):
            (shutil.copytree if file.is_dir() else shutil.copy)(file, old / file.name)
        else:
            shutil.copy(file, old / "0_Transformer")
    modules = json.loads((old / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (old / "modules.json").write_text(json.dumps(modules))
    return old


def save_cross_encoder(folder: Path, num_labels: int = 1) -> Path:
    """The folder of a tiny reranker, as the installed release saves it."""
    place = save_transformer(folder, num_labels=num_labels)
    CrossEncoder(str(place), device="cpu").save_pretrained(str(folder / "reranker"), create_model_card=False)
    return folder / "reranker"
