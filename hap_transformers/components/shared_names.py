"""Names of modules that several families have in common."""

from typing import Any

from .names import HeadNames, NeuronNames


def bert_heads(attention: str, **names: Any) -> HeadNames:
    """Heads as in BERT, with the attention module at this path.

    Args:
        attention (`str`): Path from a layer.
        names (`Any`): Other fields of [`HeadNames`].
    """
    query, key, value = (f"{attention}.{name}" for name in ("query", "key", "value"))
    return HeadNames(attention, query, key, value, "attention.output.dense", **names)


BERT_NEURONS = NeuronNames(("intermediate.dense",), "output.dense", "intermediate.intermediate_act_fn")
SELF_ATTENTION = HeadNames(
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    num_heads="num_heads",
    head_size="head_dim",
)
