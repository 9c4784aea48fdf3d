"""Tiny language models of the families that the zoo leaves out, as the same tests of all would take long."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}


@dataclass
class Decoder:
    """One family: its name in Transformers, the arguments of its config beside the common ones, and the config's."""

    family: str
    sizes: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""

    def config(self):
        return getattr(transformers, f"{self.family}{self.suffix}Config")(**{**SIZES, **self.sizes})

    def model(self):
        """The model in float64, with weights large enough that every head and neuron matters."""
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.family}ForCausalLM")(self.config())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model.double().eval()


DECODERS = {
    "gemma": Decoder("Gemma", {**GROUPED, "head_dim": 6}),
    "gemma2": Decoder("Gemma2", {**GROUPED, "head_dim": 6, "query_pre_attn_scalar": 3}),
    "gemma3": Decoder("Gemma3", {**GROUPED, "head_dim": 6, "query_pre_attn_scalar": 3}, "Text"),
    "gpt_neox": Decoder("GPTNeoX"),
    "granite": Decoder("Granite", {**GROUPED, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "olmo": Decoder("Olmo", GROUPED),
    "olmo2": Decoder("Olmo2", GROUPED),
    "phi": Decoder("Phi", {**GROUPED, "partial_rotary_factor": 0.5}),
    "phi3": Decoder("Phi3", {"partial_rotary_factor": 1.0}),
}
