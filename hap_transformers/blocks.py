"""A uniform view of a model's attention and feed-forward blocks, through the architecture table."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import Architecture, get_architecture
from .projections import Projection


@dataclass
class Block:
    """Components of one layer that can be removed one by one: attention heads, or feed-forward neurons.

    A component owns the same number of consecutive rows (and biases) in every input projection and of consecutive
    columns in the output projection. The output projection's bias belongs to no component.

    Args:
        index (`int`): Number of the layer.
        inputs (`list[Projection]`): The projections whose rows belong to the components.
        output (`Projection`): The projection whose columns belong to the components.
        num_components (`int`): Number of components.
    """

    index: int
    inputs: list[Projection]
    output: Projection
    num_components: int

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that components own, each once, among those of their modules."""
        owned = [p for projection in self.inputs for p in projection.parameters] + [self.output.module.weight]
        return list(dict.fromkeys(owned))

    def sum_over_components(self, tensors: Mapping[nn.Parameter, torch.Tensor]) -> torch.Tensor:
        """Sums tensors shaped like `parameters` into one number a component, shape `(num_components,)`."""
        owned = [self.output.matrix(tensors[self.output.module.weight]).T]
        for projection in self.inputs:
            owned.append(projection.matrix(tensors[projection.module.weight]))
            if projection.module.bias is not None:
                owned.append(projection.outputs_of(tensors[projection.module.bias]))
        return torch.stack([rows.reshape(self.num_components, -1).sum(1) for rows in owned]).sum(0)

    def weights_per_component(self) -> int:
        """Number of weights one component owns (p_c)."""
        matrices = [self.output.matrix(self.output.module.weight)]
        matrices += [projection.matrix(projection.module.weight) for projection in self.inputs]
        biases = sum(projection.out_features for projection in self.inputs if projection.module.bias is not None)
        return (sum(matrix.numel() for matrix in matrices) + biases) // self.num_components


@dataclass
class AttentionBlock(Block):
    """One layer's attention, seen the same way in every architecture.

    Args:
        attention (`nn.Module`): The module that splits its input into heads.
        head_dim (`int`): Rows (and columns) a head owns in each projection.
        kept_heads (`list[int]`): The heads still there, by their number in the original model.
        num_original_heads (`int`): Heads the original model had here.
        architecture (`Architecture`): The table entry the block was read through.
    """

    attention: nn.Module
    head_dim: int
    kept_heads: list[int]
    num_original_heads: int
    architecture: Architecture

    @property
    def num_heads(self) -> int:
        """Number of heads still there."""
        return self.num_components


@dataclass
class FeedForwardBlock(Block):
    """One layer's feed-forward block; a component is a neuron."""


def attention_blocks(model: PreTrainedModel) -> list[AttentionBlock]:
    """Lists a model's self-attention blocks, first layer first.

    What is left of a pruned layer is read off its weights and `config.pruned_heads`, so that the view is right for
    fresh, pruned and reloaded models alike.

    Raises:
        ValueError: If the architecture is unknown, or the weights and `config.pruned_heads` contradict each other.
    """
    architecture = get_architecture(model)
    total, head_dim = model.config.num_attention_heads, model.config.hidden_size // model.config.num_attention_heads
    recorded = {int(i): set(heads) for i, heads in (getattr(model.config, "pruned_heads", None) or {}).items()}
    roles = [architecture.query, architecture.key, architecture.value]
    blocks = []
    for index, layer in enumerate(model.base_model.get_submodule(architecture.layers)):
        path = f"{architecture.layers}.{index}."
        inputs = [
            Projection(path + role, layer.get_submodule(role), *((part, 3) if architecture.fused else ()))
            for part, role in enumerate(roles)
        ]
        count = inputs[0].out_features // head_dim
        kept = list(range(total))
        if count != total:
            kept = [head for head in kept if head not in recorded.get(index, ())]
        if count != len(kept):
            raise ValueError(
                f"Layer {index} of {type(model).__name__} has {count} heads, but config.pruned_heads leaves it "
                f"{len(kept)}. Do not edit config.pruned_heads by hand; reload the model from its checkpoint."
            )
        blocks.append(
            AttentionBlock(
                index=index,
                inputs=inputs,
                output=Projection(path + architecture.output, layer.get_submodule(architecture.output)),
                num_components=count,
                attention=layer.get_submodule(architecture.attention),
                head_dim=head_dim,
                kept_heads=kept,
                num_original_heads=total,
                architecture=architecture,
            )
        )
    return blocks


def feed_forward_blocks(model: PreTrainedModel) -> list[FeedForwardBlock]:
    """Lists a model's feed-forward blocks, first layer first.

    Raises:
        ValueError: If the architecture is unknown.
    """
    architecture = get_architecture(model)
    blocks = []
    for index, layer in enumerate(model.base_model.get_submodule(architecture.layers)):
        path = f"{architecture.layers}.{index}."
        inputs = [Projection(path + name, layer.get_submodule(name)) for name in architecture.ffn_inputs]
        output = Projection(path + architecture.ffn_output, layer.get_submodule(architecture.ffn_output))
        blocks.append(FeedForwardBlock(index, inputs, output, inputs[0].out_features))
    return blocks
