"""Tokenizers of every kind, trained on a few lines, and models of their size."""

import dataclasses
from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from zoo import ZOO


SEEN = [
    "The river runs past the old mill, and the miller's daughter sings.",
    "A café by the river sells tea & naïve little cakes – for 3 euros.",
    "Runners run along the river; the runner who sings runs slower.",
]
UNSEEN = [
    "Mountains rise behind the village where shepherds keep their sheep.",
    "The shepherd's whistle carries over the valley, past the highest mountains.",
    "In winter the villagers weave blankets, sheepskins and heavy woollen coats.",
    "Übermäßig viele Schäfer wohnen in den Bergen, señor; 1024 of them play chess.",
    "Whistling winds and weaving looms: the valley's villagers winter quietly.",
]
CORPUS = SEEN + UNSEEN
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}


def finished(backend: Tokenizer, trainer: trainers.Trainer, **special: str) -> PreTrainedTokenizerFast:
    """Trains a tokenizer, and adds special tokens as the last ones, so that their ids change."""
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<user>"])
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    return tokenizer


def wordpiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=["[UNK]"], show_progress=False)
    return finished(backend, trainer, unk_token="[UNK]")


def byte_bpe() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return finished(backend, trainers.BpeTrainer(vocab_size=460, initial_alphabet=alphabet, show_progress=False))


def space_bpe(byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    """BPE of characters, with ▁ for spaces; with `byte_fallback`, as Llama's, unknown characters are bytes."""
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(spaces)
    size = 250 + len(in_bytes)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", *in_bytes], show_progress=False)
    return finished(backend, trainer, unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = {"special_tokens": ["<unk>"], "unk_token": "<unk>"}
    trainer = trainers.UnigramTrainer(vocab_size=200, show_progress=False, **special)
    return finished(backend, trainer, unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "WordPiece": wordpiece,
    "byte-level BPE": byte_bpe,
    "BPE": space_bpe,
    "BPE with byte fallback": lambda: space_bpe(byte_fallback=True),
    "Unigram": unigram,
}


def model_for(tokenizer, model_type="bert", task="ForMaskedLM", more: int = 0, **sizes) -> PreTrainedModel:
    """A tiny model with a row for every id, and `more` rows."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    ids |= {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 128}
    tiny = dataclasses.replace(ZOO[model_type], task=task)
    return tiny.model(torch.float32, **{"vocab_size": len(tokenizer) + more, **ids, **sizes})
