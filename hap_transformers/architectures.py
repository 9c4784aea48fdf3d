"""Where each supported architecture keeps the projections that heads and neurons own.

This table is all that the package knows about model families. To support another one, add an entry to
`ARCHITECTURES` under its `config.model_type`:

    >>> from hap_transformers import ARCHITECTURES, Architecture
    >>> ARCHITECTURES["my_bert"] = Architecture(layers="encoder.layer", **BERT_NAMES)  # doctest: +SKIP
"""

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """Names of the attention and feed-forward modules of one model family.

    Args:
        layers (`str`): Path of the layers' `ModuleList`, from `model.base_model`.
        attention (`str`): Path, from a layer, of the module that splits its input into heads.
        query (`str`): Path, from a layer, of the query projection.
        key (`str`): Path, from a layer, of the key projection.
        value (`str`): Path, from a layer, of the value projection. Where query, key and value are one fused
            projection, all three name it; its outputs are then queries, keys and values in this order.
        output (`str`): Path, from a layer, of the projection that reads the heads' concatenated contexts.
        ffn_inputs (`tuple[str, ...]`): Paths, from a layer, of the projections whose outputs are the neurons.
        ffn_output (`str`): Path, from a layer, of the projection that reads the neurons' activations.
        num_heads (`str`): Attribute of the attention module that holds its number of heads.
        width (`str`): Attribute of the attention module that holds heads x head size.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    ffn_inputs: tuple[str, ...]
    ffn_output: str
    num_heads: str = "num_attention_heads"
    width: str = "all_head_size"

    @property
    def fused(self) -> bool:
        """Whether query, key and value are one projection."""
        return self.query == self.key == self.value


BERT_NAMES = {
    "attention": "attention.self",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "ffn_inputs": ("intermediate.dense",),
    "ffn_output": "output.dense",
}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(layers="encoder.layer", **BERT_NAMES),
    "roberta": Architecture(layers="encoder.layer", **BERT_NAMES),
    "electra": Architecture(layers="encoder.layer", **BERT_NAMES),
    "distilbert": Architecture(
        layers="transformer.layer",
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        ffn_inputs=("ffn.lin1",),
        ffn_output="ffn.lin2",
        num_heads="n_heads",
        width="dim",
    ),
    "gpt2": Architecture(
        layers="h",
        attention="attn",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        output="attn.c_proj",
        ffn_inputs=("mlp.c_fc",),
        ffn_output="mlp.c_proj",
        num_heads="num_heads",
        width="embed_dim",
    ),
}


def get_architecture(model: PreTrainedModel) -> Architecture:
    """Looks up the table entry of a model.

    Raises:
        ValueError: If the model's type is not in `ARCHITECTURES`.
    """
    model_type = model.config.model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__} has model type '{model_type}', which hap_transformers does not know. Supported: "
            f"{', '.join(sorted(ARCHITECTURES))}. To add it, set hap_transformers.ARCHITECTURES['{model_type}'] = "
            "Architecture(...) with the names of its attention and feed-forward projections."
        )
    return ARCHITECTURES[model_type]
