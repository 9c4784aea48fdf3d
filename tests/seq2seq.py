"""Tiny encoder-decoders that generate, with the paths of what their heads and neurons write, written out by hand."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers


# Transformers makes the cache of T5 for as many layers as the encoder has.
ENCODER, DECODER = 3, 2
HIDDEN, HEADS, VOCABULARY = 16, 4, 40
# Layers of self-attention in the encoder and the decoder, and of cross-attention, as they are numbered.
SELF, CROSS = list(range(ENCODER, ENCODER + DECODER)), list(range(ENCODER + DECODER, ENCODER + 2 * DECODER))
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BART_SIZES = {
    "d_model": HIDDEN,
    "encoder_layers": ENCODER,
    "decoder_layers": DECODER,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "forced_eos_token_id": None,
}
T5_SIZES = {
    "d_model": HIDDEN,
    "num_layers": ENCODER,
    "num_decoder_layers": DECODER,
    "num_heads": HEADS,
    "d_kv": 6,
    "d_ff": 24,
    "relative_attention_num_buckets": 8,
    "feed_forward_proj": "gated-gelu",
}
BART_PATHS = ("model.{}.layers.{}.self_attn.out_proj", "model.decoder.layers.{}.encoder_attn.out_proj")
T5_PATHS = ("{}.block.{}.layer.0.SelfAttention.o", "decoder.block.{}.layer.1.EncDecAttention.o")


@dataclass
class Seq2Seq:
    """One architecture.

    Args:
        family: Prefix of its classes in Transformers.
        paths: Of the output projections of self-attention, by part and layer, and of cross-attention.
        neurons: Of those of feed-forward blocks in the encoder and in the decoder, by layer.
        decoder_heads: Heads of the decoder's layers.
        sizes: Arguments of the config.
        audio: Whether inputs are spectrograms.
    """

    family: str
    paths: tuple[str, str]
    neurons: tuple[str, str]
    decoder_heads: int = HEADS
    sizes: dict[str, Any] = field(default_factory=dict)
    audio: bool = False

    def model(self, dtype: torch.dtype = torch.float64, task: str = "ForConditionalGeneration", **changes: Any):
        """The model, with weights large enough that every head and neuron matters."""
        torch.manual_seed(0)
        config = getattr(transformers, self.family + "Config")(
            **TOKENS, **{"vocab_size": VOCABULARY, **self.sizes, **changes}
        )
        model = getattr(transformers, self.family + task)(config).to(dtype).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.generation_config = transformers.GenerationConfig(**TOKENS)
        model.tie_weights()
        return model

    def batch(self, size: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
        """Inputs with padding in the encoder and, by -100 among the labels, in the decoder."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, VOCABULARY, (size, 7), generator=generator)
        labels[1:2, 5:] = -100
        if self.audio:
            return {"input_features": torch.randn(size, 80, 16, generator=generator, dtype=dtype), "labels": labels}
        tokens = torch.randint(3, VOCABULARY, (size, 7), generator=generator)
        mask = torch.ones_like(tokens)
        tokens[2:3, 4:], mask[2:3, 4:] = 0, 0
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

    def reader(self, kind: str, layer: int) -> str:
        """Path of the projection that reads the components of a layer, by the number that the package gives it."""
        of_encoder = layer < ENCODER
        if kind == "neurons":
            return self.neurons[not of_encoder].format(layer - (0 if of_encoder else ENCODER))
        if layer in CROSS:
            return self.paths[1].format(layer - CROSS[0])
        return self.paths[0].format("encoder" if of_encoder else "decoder", layer - (0 if of_encoder else ENCODER))

    def heads(self, layer: int) -> int:
        """Heads of a layer of the dense model."""
        return HEADS if layer < ENCODER else self.decoder_heads

    def masked(self, model: Any, **removed: dict[int, list[int]]) -> Any:
        """A copy of a dense model whose output projections ignore the removed components."""
        copied = copy.deepcopy(model)
        for kind, layers in removed.items():
            for layer, numbers in layers.items():
                weight = copied.get_submodule(self.reader(kind, layer)).weight.data
                count = weight.shape[1] if kind == "neurons" else self.heads(layer)
                weight.unflatten(1, (count, -1))[:, numbers] = 0
        return copied


SEQ2SEQ: dict[str, Seq2Seq] = {
    "bart": Seq2Seq(
        "Bart",
        BART_PATHS,
        ("model.encoder.layers.{}.fc2", "model.decoder.layers.{}.fc2"),
        2,
        {**BART_SIZES, "max_position_embeddings": 32},
    ),
    "t5": Seq2Seq(
        "T5",
        T5_PATHS,
        ("encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"),
        sizes=T5_SIZES,
    ),
    "whisper": Seq2Seq(
        "Whisper",
        BART_PATHS,
        ("model.encoder.layers.{}.fc2", "model.decoder.layers.{}.fc2"),
        2,
        {**BART_SIZES, "max_source_positions": 8, "max_target_positions": 32, "num_mel_bins": 80},
        audio=True,
    ),
}


def all_of(count: int) -> list[int]:
    """All of so many numbers."""
    return list(range(count))
