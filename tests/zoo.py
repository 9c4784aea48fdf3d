"""A tiny model of every supported architecture, and the paths of the projections that heads and neurons own."""

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from hap_transformers.components.releases import DINOV2_RENAMED, VIT_RENAMED


LAYERS, HEADS, HIDDEN, NEURONS, VOCABULARY = 2, 4, 16, 24, 40
ALL_HEADS, ALL_NEURONS = list(range(HEADS)), list(range(NEURONS))
# Their streams have outliers, so each input's ridge is a share of its own second moment.
NORM_FIRST = {"beit", "clip", "deit", "dinov2", "gpt2", "llama", "mistral", "modernbert", "opt", "qwen2", "qwen3"}
NORM_FIRST |= {"siglip", "swin", "t5", "t5-gated", "vit", "whisper"}


@dataclass
class Tiny:
    """One architecture.

    Paths are written out here, so the library's table of architectures is checked against an independent one.

    Args:
        family: Prefix of its classes in Transformers.
        layer: Path of a layer from the model.
        heads_in: Paths, from there, of the projections whose outputs belong to heads. A fused projection of n equal
            parts appears n times.
        heads_out: Path of the projection whose inputs belong to heads.
        neurons_in, neurons_out: The same of neurons.
        sizes: Arguments of the config, beside the common ones.
        names: The names of the common ones: hidden size, heads, layers, neurons.
        task: Suffix of the model class.
        inputs: "text", "image" or "audio".
        part: Where the config has another with the sizes, its name.
    """

    family: str
    layer: str
    heads_in: tuple[str, ...]
    heads_out: str
    neurons_in: tuple[str, ...]
    neurons_out: str
    sizes: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    task: str = "ForSequenceClassification"
    inputs: str = "text"
    part: str = ""

    @property
    def shared(self) -> int:
        """Query heads that share a key/value head."""
        return self.sizes.get("num_attention_heads", HEADS) // HEADS

    def config(self, **changes: Any):
        common = dict(zip(self.names, (HIDDEN, HEADS, LAYERS, NEURONS), strict=True))
        text = {"vocab_size": VOCABULARY, "max_position_embeddings": 32} if self.inputs == "text" else {}
        sizes = {**common, **text, **self.sizes}
        if self.part:
            own = {name: changes[name] for name in (*self.names, "attn_implementation") if name in changes}
            sizes = {self.part: {**sizes, **own}}
        sizes = {"num_labels": 2, **sizes, **changes}
        return getattr(transformers, self.family + "Config")(**sizes)

    def model(self, dtype: torch.dtype = torch.float64, **changes: Any):
        """The model, with weights large enough that every head and neuron matters."""
        torch.manual_seed(0)
        model = getattr(transformers, self.family + self.task)(self.config(**changes)).to(dtype).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model

    def batch(self, size: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        """Inputs, texts with padding."""
        generator = torch.Generator().manual_seed(0)
        if self.inputs == "image":
            return {"pixel_values": torch.randn(size, 3, 8, 8, generator=generator, dtype=dtype)}
        if self.inputs == "audio":
            return {"input_features": torch.randn(size, 80, 16, generator=generator, dtype=dtype)}
        tokens = torch.randint(3, VOCABULARY, (size, 7), generator=generator)
        tokens[:, 3] = 2  # BART and T5 classify at the end of sentence.
        mask = torch.ones_like(tokens)
        tokens[1:2, 4:], mask[1:2, 4:] = 0, 0
        return {"input_ids": tokens, "attention_mask": mask}


def _three(path: str) -> tuple[str, str, str]:
    """Paths of the query, key and value projections."""
    return path.format("q"), path.format("k"), path.format("v")


SELF = ("attention.self.query", "attention.self.key", "attention.self.value")
BERT_OUT = ("attention.output.dense", ("intermediate.dense",), "output.dense")
LLAMA_PATHS = (_three("self_attn.{}_proj"), "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
BART_PATHS = (_three("self_attn.{}_proj"), "self_attn.out_proj", ("fc1",), "fc2")
OLD_VIT_PATHS = (tuple(path.replace("self", "attention") for path in SELF), *BERT_OUT)
NEW_VIT_PATHS = (_three("attention.{}_proj"), "attention.o_proj", ("mlp.fc1",), "mlp.fc2")
VIT_LAYER, VIT_PATHS = (".layers.{}", NEW_VIT_PATHS) if VIT_RENAMED else (".encoder.layer.{}", OLD_VIT_PATHS)


def _bert(family: str, prefix: str, **sizes: Any) -> Tiny:
    return Tiny(family, prefix + ".encoder.layer.{}", SELF, *BERT_OUT, sizes)


def _deberta(**sizes: Any) -> Tiny:
    heads_in = tuple(path + "_proj" for path in SELF)
    return Tiny("DebertaV2", "deberta.encoder.layer.{}", heads_in, *BERT_OUT, {**RELATIVE, **sizes})


def _vit(family: str, layer: str, paths: tuple[Any, ...], **settings: Any) -> Tiny:
    sizes = {"image_size": 8, "patch_size": 4, **settings.pop("sizes", {})}
    return Tiny(family, layer, *paths, sizes, task="ForImageClassification", inputs="image", **settings)


def _tower(family: str) -> Tiny:
    paths = (_three("self_attn.{}_proj"), "self_attn.out_proj", ("mlp.fc1",), "mlp.fc2")
    return _vit(family, "vision_model.encoder.layers.{}", paths, part="vision_config")


def _llama(family: str, **sizes: Any) -> Tiny:
    sizes = {"num_attention_heads": 2 * HEADS, "num_key_value_heads": HEADS, "head_dim": 4, "pad_token_id": 0, **sizes}
    return Tiny(family, "model.layers.{}", *LLAMA_PATHS, sizes)


def _t5(wi: tuple[str, ...], activation: str, task: str) -> Tiny:
    block, sizes = "layer.1.DenseReluDense.", {**T5_TOKENS, "feed_forward_proj": activation}
    heads = (_three("layer.0.SelfAttention.{}"), "layer.0.SelfAttention.o")
    neurons = (tuple(block + name for name in wi), block + "wo")
    return Tiny("T5", "transformer.encoder.block.{}", *heads, *neurons, sizes, T5_NAMES, task)


SEQ2SEQ_NAMES = ("d_model", "encoder_attention_heads", "encoder_layers", "encoder_ffn_dim")
DECODER = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
T5_NAMES = ("d_model", "num_heads", "num_layers", "d_ff")
T5_TOKENS = {**TOKENS, "d_kv": 6, "num_decoder_layers": 1, "relative_attention_num_buckets": 8}
DINOV2_NAMES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "mlp_ratio")
DINOV2_PATHS, DINOV2_SIZES = (*OLD_VIT_PATHS[:2], ("mlp.fc1",), "mlp.fc2"), {"mlp_ratio": NEURONS / HIDDEN}
if DINOV2_RENAMED:  # Where the ratio must be whole. With gates, two thirds of the neurons are left, in eights.
    DINOV2_PATHS = (*NEW_VIT_PATHS[:2], ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
    DINOV2_SIZES = {"mlp_ratio": 2, "use_swiglu_ffn": True}
SWIN = {
    "embed_dim": HIDDEN,
    "num_heads": [HEADS],
    "depths": [LAYERS],
    "mlp_ratio": NEURONS / HIDDEN,
    "patch_size": 2,
    "window_size": 2,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}

ZOO: dict[str, Tiny] = {
    "albert": Tiny(
        "Albert",
        "albert.encoder.albert_layer_groups.{}.albert_layers.0",
        ("attention.query", "attention.key", "attention.value"),
        "attention.dense",
        ("ffn",),
        "ffn_output",
        {"num_hidden_groups": 2, "num_hidden_layers": 4, "embedding_size": 8},
    ),
    "bart": Tiny(
        "Bart",
        "model.encoder.layers.{}",
        *BART_PATHS,
        {**DECODER, **TOKENS, "num_labels": 3},  # A config with 2 is saved without the number, and 3 is the default.
        SEQ2SEQ_NAMES,
    ),
    "beit": _vit("Beit", "beit" + VIT_LAYER, VIT_PATHS, sizes={"use_relative_position_bias": True}),
    "bert": _bert("Bert", "bert"),
    "camembert": _bert("Camembert", "roberta"),
    "clip": _tower("CLIP"),
    "deberta-v2": _deberta(),
    "deberta-v3": _deberta(share_att_key=True, norm_rel_ebd="layer_norm"),
    "deit": _vit("DeiT", "deit" + VIT_LAYER, VIT_PATHS),
    "dinov2": _vit("Dinov2", "dinov2.encoder.layer.{}", DINOV2_PATHS, sizes=DINOV2_SIZES, names=DINOV2_NAMES),
    "distilbert": Tiny(
        "DistilBert",
        "distilbert.transformer.layer.{}",
        _three("attention.{}_lin"),
        "attention.out_lin",
        ("ffn.lin1",),
        "ffn.lin2",
        names=("dim", "n_heads", "n_layers", "hidden_dim"),
    ),
    "electra": _bert("Electra", "electra", embedding_size=8),
    "gpt2": Tiny(
        "GPT2",
        "transformer.h.{}",
        ("attn.c_attn",) * 3,
        "attn.c_proj",
        ("mlp.c_fc",),
        "mlp.c_proj",
        {"n_positions": 32, "pad_token_id": 0},
        ("n_embd", "n_head", "n_layer", "n_inner"),
    ),
    "llama": _llama("Llama", attention_bias=True, mlp_bias=True),
    "mistral": _llama("Mistral", head_dim=6),
    "modernbert": Tiny(
        "ModernBert",
        "model.layers.{}",
        ("attn.Wqkv",) * 3,
        "attn.Wo",
        ("mlp.Wi",) * 2,
        "mlp.Wo",
        {
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "global_attn_every_n_layers": 2,
            "reference_compile": False,
        },
    ),
    "mpnet": Tiny(
        "MPNet",
        "mpnet.encoder.layer.{}",
        _three("attention.attn.{}"),
        "attention.attn.o",
        ("intermediate.dense",),
        "output.dense",
    ),
    "opt": Tiny(
        "OPT",
        "model.decoder.layers.{}",
        *BART_PATHS,
        {**TOKENS, "word_embed_proj_dim": HIDDEN, "activation_function": "gelu"},
        ("hidden_size", "num_attention_heads", "num_hidden_layers", "ffn_dim"),
    ),
    "qwen2": _llama("Qwen2"),
    "qwen3": _llama("Qwen3", head_dim=6),
    "roberta": _bert("Roberta", "roberta"),
    "siglip": _tower("Siglip"),
    "swin": _vit(
        "Swin",
        "swin.encoder.layers.0.blocks.{}",
        VIT_PATHS if VIT_RENAMED else (SELF, *BERT_OUT),
        sizes=SWIN,
        names=("embed_dim", "num_heads", "depths", "mlp_ratio"),
    ),
    "t5": _t5(("wi",), "gelu", "ForSequenceClassification"),
    "t5-gated": _t5(("wi_0", "wi_1"), "gated-gelu", "ForTokenClassification"),
    "vit": _vit("ViT", "vit" + VIT_LAYER, VIT_PATHS),
    "whisper": Tiny(
        "Whisper",
        "encoder.layers.{}",
        *BART_PATHS,
        {**DECODER, **TOKENS, "max_source_positions": 8, "vocab_size": VOCABULARY, "classifier_proj_size": 8},
        SEQ2SEQ_NAMES,
        "ForAudioClassification",
        "audio",
    ),
    "xlm-roberta": _bert("XLMRoberta", "roberta"),
}


# `AutoModel` makes a model of two towers of these, which is refused.
TWO_TOWERS = {"clip", "siglip"}


def masked_weights(model: torch.nn.Module, tiny: Tiny, heads: dict, neurons: dict) -> dict[str, torch.Tensor]:
    """The weights, by name, of a dense model's output projections that ignore the removed components."""
    weights = {}
    for layer, (path, removed, count) in itertools.product(
        range(LAYERS), ((tiny.heads_out, heads, HEADS), (tiny.neurons_out, neurons, NEURONS))
    ):
        module = f"{tiny.layer.format(layer)}.{path}"
        weight = model.get_submodule(module).weight.detach().clone()
        rows = weight if isinstance(model.get_submodule(module), Conv1D) else weight.T
        components = rows.unflatten(0, (count, -1))
        for component in removed.get(layer, ()):
            components[component] = 0
        weights[f"{module}.weight"] = weight
    return weights


def masked(model: torch.nn.Module, tiny: Tiny, heads: dict, neurons: dict) -> torch.nn.Module:
    """A copy of a dense model whose output projections ignore the removed components."""
    copied = copy.deepcopy(model)
    for name, weight in masked_weights(model, tiny, heads, neurons).items():
        copied.get_parameter(name).data = weight
    return copied


def masked_logits(model: torch.nn.Module, tiny: Tiny, heads: dict, neurons: dict) -> torch.Tensor:
    """The logits of [`masked`], without the copy, which takes longer than they do."""
    weights = masked_weights(model, tiny, heads, neurons)
    return torch.func.functional_call(model, weights, (), tiny.batch(dtype=model.dtype)).logits


def logits(model: torch.nn.Module, tiny: Tiny) -> torch.Tensor:
    """A model's logits on its architecture's batch."""
    return model(**tiny.batch(dtype=model.dtype)).logits
