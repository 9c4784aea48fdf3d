"""Where each supported architecture keeps the modules that components own.

This table is all that the package knows about model families. To support another one, add an entry to
`ARCHITECTURES` under its `config.model_type`:

    >>> from hap_transformers import ARCHITECTURES, Architecture
    >>> names = {"heads": BERT_HEADS, "neurons": BERT_NEURONS}
    >>> ARCHITECTURES["my_bert"] = Architecture("encoder.layer", names)  # doctest: +SKIP
"""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .convolutional import CONVOLUTIONAL
from .decoders import DECODERS
from .encoder_decoders import ENCODER_DECODERS
from .gguf import quantized_by
from .names import Architecture, EmbeddingNames, HeadNames, NeuronNames
from .record import METHOD
from .shared_names import BERT_NEURONS, bert_heads
from .vision import TOWERS, VISION


BERT_HEADS = bert_heads("attention.self")
WORD_EMBEDDINGS = {"embedding_dims": EmbeddingNames("embeddings.word_embeddings")}
BERT = Architecture("encoder.layer", {**WORD_EMBEDDINGS, "heads": BERT_HEADS, "neurons": BERT_NEURONS})

ALBERT = Architecture(
    "encoder.albert_layer_groups.*.albert_layers",
    {
        **WORD_EMBEDDINGS,
        "heads": HeadNames(
            attention="attention",
            query="attention.query",
            key="attention.key",
            value="attention.value",
            output="attention.dense",
            attention_norm="attention.LayerNorm",
        ),
        "neurons": NeuronNames(("ffn",), "ffn_output", "activation"),
    },
)
DEBERTA_HEADS = replace(
    BERT_HEADS,
    query="attention.self.query_proj",
    key="attention.self.key_proj",
    value="attention.self.value_proj",
    position_inputs=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
)
DISTILBERT = Architecture(
    "transformer.layer",
    {
        **WORD_EMBEDDINGS,
        "heads": HeadNames(
            attention="attention",
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            output="attention.out_lin",
            num_heads="n_heads",
            width="dim",
        ),
        "neurons": NeuronNames(("ffn.lin1",), "ffn.lin2", "ffn.activation", config_neurons="hidden_dim"),
    },
)
GPT2 = Architecture(
    "h",
    {
        "embedding_dims": EmbeddingNames("wte"),
        "heads": HeadNames(
            attention="attn",
            query="attn.c_attn",
            key="attn.c_attn",
            value="attn.c_attn",
            output="attn.c_proj",
            num_heads="num_heads",
            width="split_size",
            head_size="head_dim",
        ),
        "neurons": NeuronNames(("mlp.c_fc",), "mlp.c_proj", "mlp.act", config_neurons="n_inner"),
    },
    norm_first=True,
    also_added=("crossattention.c_proj",),  # As a decoder, GPT-2 adds what it reads of the encoder.
)
MODERNBERT = Architecture(
    "layers",
    {
        "embedding_dims": EmbeddingNames("embeddings.tok_embeddings"),
        "heads": HeadNames(
            attention="attn",
            query="attn.Wqkv",
            key="attn.Wqkv",
            value="attn.Wqkv",
            output="attn.Wo",
            num_heads="num_heads",
            bilinear=False,
            rotary=True,
        ),
        "neurons": NeuronNames(("mlp.Wi", "mlp.Wi"), "mlp.Wo", "mlp.act"),
    },
    norm_first=True,
)
MPNET_HEADS = HeadNames(
    attention="attention.attn",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    output="attention.attn.o",
    position_bias="given",
)

ARCHITECTURES: dict[str, Architecture] = {
    **CONVOLUTIONAL,
    **VISION,
    **DECODERS,
    **ENCODER_DECODERS,
    "albert": ALBERT,
    "bert": BERT,
    "camembert": BERT,
    "deberta-v2": replace(BERT, names={**BERT.names, "heads": DEBERTA_HEADS}),
    "distilbert": DISTILBERT,
    "electra": BERT,
    "gpt2": GPT2,
    "modernbert": MODERNBERT,
    "mpnet": replace(BERT, names={**BERT.names, "heads": MPNET_HEADS}),
    "roberta": BERT,
    "xlm-roberta": BERT,
}


def _submodules(model: Any) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules()) if isinstance(model, nn.Module) else []


def get_architecture(model: PreTrainedModel) -> Architecture:
    """Looks up the table entry of a model.

    Raises:
        ValueError: If the model's type is not in `ARCHITECTURES`, the model has two towers, or it is quantized.
        TypeError: If it is no model of Transformers.
    """
    if not isinstance(model, PreTrainedModel) and getattr(model, "peft_config", None) is None:
        inner = [
            f"its {name} ({type(m).__name__})" for name, m in _submodules(model) if isinstance(m, PreTrainedModel)
        ]
        remedy = f"give {inner[0]}" if inner else "give a model of Transformers, such as BertModel"
        raise TypeError(f"{type(model).__name__} is no model of Transformers (PreTrainedModel); {remedy}.")
    model_type = model.config.model_type
    method = quantized_by(model)
    if method not in (None, METHOD):
        raise ValueError(
            f"{type(model).__name__} is quantized (quant_method '{method}'); score and prune before quantizing."
        )
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__} has model type '{model_type}', which hap_transformers does not know. Supported: "
            f"{', '.join(sorted(ARCHITECTURES))}. To add it, set hap_transformers.ARCHITECTURES['{model_type}'] = "
            "Architecture(...) with the names of its attention and feed-forward projections."
        )
    architecture = ARCHITECTURES[model_type]
    for name, value in architecture.requires.items():
        if (found := getattr(model.config, name)) != value:
            raise ValueError(
                f"The config of {type(model).__name__} has {name}={found}; models of type '{model_type}' are "
                f"supported with {name}={value} only, as others are built otherwise."
            )
    if architecture.tower and {f"{name}_model" for name in TOWERS} <= dict(model.base_model.named_children()).keys():
        family = type(model).__name__.removesuffix("Model")
        raise ValueError(
            f"{type(model).__name__} has two towers whose outputs are compared across the examples of a batch, so "
            f"they cannot be scored or pruned together. Load one by {family}VisionModel.from_pretrained or "
            f"{family}TextModel.from_pretrained, which read the same checkpoint."
        )
    return architecture


def tower_path(model: PreTrainedModel, architecture: Architecture) -> str:
    """Path of the module that is the tower, with a final dot, from the base model; empty where it is the model."""
    name = f"{architecture.tower}_model"
    return f"{name}." if architecture.tower and name in dict(model.base_model.named_children()) else ""


def config_of_layers(model: PreTrainedModel, architecture: Architecture) -> PretrainedConfig:
    """The config with the sizes of the layers: the model's, or that of its tower."""
    return getattr(model.config, f"{architecture.tower}_config", model.config) if architecture.tower else model.config


def layer_paths(model: PreTrainedModel, architecture: Architecture) -> list[str]:
    """Path of every layer from the base model, with a final dot; a decoder's layers come after the encoder's.

    Raises:
        ValueError: If the model does not have the lists of layers that the architecture names.
    """
    encoder = _paths_in(model, architecture.layers, tower_path(model, architecture))
    return [*encoder, *decoder_paths(model, architecture)]


def decoder_paths(model: PreTrainedModel, architecture: Architecture) -> list[str]:
    """Path of every layer of an encoder-decoder's decoder, as [`layer_paths`] gives them; none if there is none."""
    decoder = architecture.decoder
    if decoder is None or decoder.layers not in dict(model.base_model.named_modules()):
        return []
    return _paths_in(model, decoder.layers)


def named_layers(model: PreTrainedModel, architecture: Architecture, kind: str) -> list[tuple[str, Any]]:
    """Every layer's path, as [`layer_paths`] gives it, with the names of a kind of component there."""
    paths, of_decoder = layer_paths(model, architecture), decoder_paths(model, architecture)
    names = architecture.decoder.names if architecture.decoder else {}
    return [(path, (names if path in of_decoder else architecture.names)[kind]) for path in paths]


MERGE = " Merge its adapters first (`merge_and_unload`); `add_adapter` puts others on the pruned model."


def _paths_in(model: PreTrainedModel, layers: str, tower: str = "") -> list[str]:
    """Path of every layer of lists of layers."""
    modules, paths = dict(model.base_model.named_modules()), [tower]
    for part in layers.split(".*."):
        lists = [path + part for path in paths]
        missing = [path for path in lists if path not in modules]
        if missing:
            wrapped = getattr(model, "peft_config", None) is not None
            remedy = MERGE if wrapped else ""
            raise ValueError(
                f"{type(model).__name__} has no module {missing[0]!r}, where the layers of a "
                f"'{model.config.model_type}' are expected; this model cannot be scored or pruned.{remedy}"
            )
        paths = [f"{path}.{i}." for path in lists for i in range(len(modules[path]))]
    # A module that is found twice is named once.
    if shared := [path.removesuffix(".") for path in paths if path.removesuffix(".") not in modules]:
        raise ValueError(
            f"The layer '{shared[0]}' of this {type(model).__name__} is the same module as a layer before it, so it "
            "cannot lose components of its own. Give it weights of its own: replace it by a copy.deepcopy of itself."
        )
    return paths
