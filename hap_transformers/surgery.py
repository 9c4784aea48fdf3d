"""Removes heads for real: rows of the query, key and value projections, columns of the output projection."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from .blocks import AttentionBlock, attention_blocks


def prune_heads(model: PreTrainedModel, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
    """Removes attention heads from a model, in place.

    The contract is that of `PreTrainedModel.prune_heads` in Transformers 4: heads are numbered as in the original
    model, heads already gone are passed over, `config.pruned_heads` accumulates. The resulting sizes are written into
    `model.config` too, so that `save_pretrained` makes a checkpoint which `from_pretrained` rebuilds. Modules stay the
    same objects (hooks survive), parameters are replaced: drop any optimizer made before.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture.
        heads_to_prune (`Mapping[int, Sequence[int]]`): Layer number to the heads to remove there. A layer may lose
            all its heads; its attention then contributes its output bias alone, without computing anything.

    Raises:
        ValueError: If the architecture is unknown or keeps its projections in something else than separate Linear
            layers, or a layer or head does not exist; the model is then untouched.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8)
        >>> model = BertModel(config)
        >>> prune_heads(model, {0: [1, 3]})
        >>> model.encoder.layer[0].attention.self.query.weight.shape
        torch.Size([4, 8])
    """
    validate_prunable(model)
    blocks = attention_blocks(model)
    heads_to_prune = validate_heads(blocks, heads_to_prune)
    for block in blocks:
        _keep_heads(block, [head for head in block.kept_heads if head not in heads_to_prune.get(block.index, ())])
    _record_structure(model, blocks)


def validate_heads(blocks: list[AttentionBlock], heads_to_prune: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """Checks that every named layer and head exists in the original model.

    Returns:
        `dict[int, list[int]]`: The same removals with sorted, plain integers.

    Raises:
        ValueError: If a layer or head is out of range.
    """
    checked = {}
    for layer, heads in heads_to_prune.items():
        if not 0 <= int(layer) < len(blocks):
            raise ValueError(
                f"Cannot prune heads of layer {layer}: the model has layers 0 to {len(blocks) - 1}. "
                "Nothing was pruned."
            )
        total = blocks[int(layer)].num_original_heads
        wrong = [head for head in heads if not 0 <= head < total]
        if wrong:
            raise ValueError(
                f"Cannot prune heads {wrong} of layer {layer}: heads are numbered 0 to {total - 1}, as in the "
                "original model. Nothing was pruned."
            )
        checked[int(layer)] = sorted({int(head) for head in heads})
    return checked


def validate_prunable(model: PreTrainedModel) -> None:
    """Checks that a model's heads can be removed, which is less than that they can be scored.

    Raises:
        ValueError: If the architecture is unknown, or keeps its projections in something else than separate Linears.
    """
    for block in attention_blocks(model):
        for projection in (*block.inputs, block.output):
            if projection.parts > 1 or not isinstance(projection.module, nn.Linear):
                raise ValueError(
                    f"Cannot prune heads of {type(model).__name__}: '{projection.name}' is a "
                    f"{'fused ' if projection.parts > 1 else ''}{type(projection.module).__name__}, and only separate "
                    "Linear layers can be sliced. Its heads and neurons can be scored."
                )


def _keep_heads(block: AttentionBlock, kept: list[int]) -> None:
    """Slices a block's projections down to the heads in `kept` (original numbers)."""
    if kept == block.kept_heads:
        return
    positions = [block.kept_heads.index(head) for head in kept]
    rows = torch.arange(block.num_heads * block.head_dim).view(block.num_heads, block.head_dim)[positions].flatten()
    for projection in block.inputs:
        _slice_linear(projection.module, rows, dim=0)
    _slice_linear(block.output.module, rows, dim=1)
    set_head_count(block, len(kept))
    block.kept_heads, block.num_components = kept, len(kept)


def _slice_linear(linear: nn.Linear, index: torch.Tensor, dim: int) -> None:
    """Keeps the given rows (`dim=0`) or columns (`dim=1`) of a Linear, whose parameters are replaced."""
    index = index.to(linear.weight.device)
    linear.weight = _like(linear.weight, linear.weight.detach().index_select(dim, index))
    if dim == 0 and linear.bias is not None:
        linear.bias = _like(linear.bias, linear.bias.detach().index_select(0, index))
    linear.out_features, linear.in_features = linear.weight.shape


def resize_linear(linear: nn.Linear, in_features: int, out_features: int) -> None:
    """Gives a Linear empty weights of another size, to be filled by a checkpoint."""
    linear.weight = _like(linear.weight, linear.weight.new_empty(out_features, in_features))
    if linear.bias is not None:
        linear.bias = _like(linear.bias, linear.bias.new_empty(out_features))
    linear.in_features, linear.out_features = in_features, out_features


def _like(parameter: nn.Parameter, tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def set_head_count(block: AttentionBlock, count: int) -> None:
    """Tells an attention module how many heads its (already resized) projections hold."""
    setattr(block.attention, block.architecture.num_heads, count)
    setattr(block.attention, block.architecture.width, count * block.head_dim)
    if count == 0:
        prefix, output = block.architecture.attention + ".", block.architecture.output
        inner = output.removeprefix(prefix) if output.startswith(prefix) else None
        block.attention.__class__ = _headless(type(block.attention), inner)


@functools.cache
def _headless(attention_class: type[nn.Module], output: str | None) -> type[nn.Module]:
    """Subclasses an attention class so that it computes no attention.

    Transformers 4 divides by the number of heads; and where there is none, projections and softmax are wasted time.
    A subclass, so that whatever recognises the module by its class (recorders of attention maps, say) still does.

    Args:
        attention_class (`type[nn.Module]`): The class of the attention module.
        output (`str`, *optional*): Path of the output projection in the module, where it lies inside.
    """

    def forward(self, *args, **kwargs):
        hidden_states = args[0] if args else kwargs.get("hidden_states", kwargs.get("query"))
        batch_size, length, _ = hidden_states.shape
        context = hidden_states.new_zeros(batch_size, length, 0)
        if output is not None:
            context = self.get_submodule(output)(context)
        return context, hidden_states.new_zeros(batch_size, 0, length, length)

    return type(f"Headless{attention_class.__name__}", (attention_class,), {"forward": forward})


def _record_structure(model: PreTrainedModel, blocks: list[AttentionBlock]) -> None:
    """Writes what is left into the config: `pruned_heads`, and every resized module for the loader."""
    blocks = [block for block in blocks if block.num_heads < block.num_original_heads]
    model.config.pruned_heads = {
        block.index: sorted(set(range(block.num_original_heads)) - set(block.kept_heads)) for block in blocks
    }
    if not blocks:
        return
    model.config.quantization_config = {
        "quant_method": "hap",
        "heads": {str(block.index): block.num_heads for block in blocks},
        "linears": {
            projection.name: [projection.module.in_features, projection.module.out_features]
            for block in blocks
            for projection in (*block.inputs, block.output)
        },
    }
