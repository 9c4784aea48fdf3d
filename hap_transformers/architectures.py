"""Where each supported architecture keeps its attention projections.

This table is all that the package knows about model families. To support another one, add an entry to
`ARCHITECTURES` under its `config.model_type`:

    >>> from hap_transformers import ARCHITECTURES, Architecture
    >>> ARCHITECTURES["my_bert"] = Architecture(layers="encoder.layer", **BERT_NAMES)  # doctest: +SKIP
"""

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """Names of the attention modules of one model family.

    Args:
        layers (`str`): Path of the layers' `ModuleList`, from `model.base_model`.
        attention (`str`): Path, from a layer, of the module that splits its input into heads.
        query (`str`): Path, from a layer, of the query projection.
        key (`str`): Path, from a layer, of the key projection.
        value (`str`): Path, from a layer, of the value projection.
        output (`str`): Path, from a layer, of the projection that reads the heads' concatenated contexts.
        num_heads (`str`): Attribute of the attention module that holds its number of heads.
        width (`str`): Attribute of the attention module that holds heads x head size.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    num_heads: str = "num_attention_heads"
    width: str = "all_head_size"


BERT_NAMES = {
    "attention": "attention.self",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
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
        num_heads="n_heads",
        width="dim",
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
            "Architecture(...) with the names of its query, key, value and output projections."
        )
    return ARCHITECTURES[model_type]
