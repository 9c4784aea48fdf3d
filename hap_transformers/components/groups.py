"""A uniform view of a model's attention and feed-forward blocks, through the architecture table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import Architecture, get_architecture
from .projections import Projection, find_projections


@dataclass
class Block:
    """Components of one layer that can be removed one by one: attention heads, or feed-forward neurons.

    A component owns, in every input projection, one of `num_components` equal runs of rows (and biases), and such a
    run of columns of the output projection. The output projection's bias belongs to no component.

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
    def sliced(self) -> list[Projection]:
        """All projections that get smaller with the block, the output last."""
        return [*self.inputs, self.output]

    @property
    def implant_rank(self) -> int:
        """Number of linear neurons, which only feed-forward blocks have."""
        return 0

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The weights that components own, each once, among those of their modules."""
        owned = [p for projection in self.inputs for p in projection.parameters] + [self.output.module.weight]
        return list(dict.fromkeys(owned))

    def sum_over_components(self, tensors: Mapping[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Sums tensors shaped like `parameters` into one number a component, shape `(num_components,)`."""
        owned = [self.output.matrix(tensors[self.output.module.weight]).T]
        for projection in self.inputs:
            owned.append(projection.matrix(tensors[projection.module.weight]))
            if projection.module.bias is not None:
                owned.append(projection.outputs_of(tensors[projection.module.bias]))
        return torch.stack([rows.reshape(self.num_components, -1).sum(1) for rows in owned]).sum(0)

    def weights_per_component(self) -> int:
        """Number of weights one component owns (p_c); 0 where no component is left."""
        rows = sum(weights_by_rows(projection) for projection in self.inputs)
        return (rows + self.output.module.weight.numel()) // max(self.num_components, 1)

    def parameters_per_component(self) -> int:
        """Number of parameters that go with one component, scored or not; 0 where no component is left."""
        unscored = [projection for projection in self.sliced[:-1] if projection not in self.inputs]
        positions = sum(weights_by_rows(projection) for projection in unscored)
        return self.weights_per_component() + positions // max(self.num_components, 1)


@dataclass
class AttentionBlock(Block):
    """One layer's attention, seen the same way in every architecture.

    Args:
        attention (`nn.Module`): The module that splits its input into heads.
        kept_heads (`Sequence[int]`): The heads still there, by their number in the original model.
        num_original_heads (`int`): Heads the original model had here.
        architecture (`Architecture`): The table entry the block was read through.
        position_inputs (`list[Projection]`): Projections of relative positions; a head owns rows of them, too, but
            they are no part of its score.
    """

    attention: nn.Module
    kept_heads: Sequence[int]
    num_original_heads: int
    architecture: Architecture
    position_inputs: list[Projection]

    @property
    def sliced(self) -> list[Projection]:
        """All projections that get smaller with the block, the output last."""
        return [*self.inputs, *self.position_inputs, self.output]

    @property
    def num_heads(self) -> int:
        """Number of heads still there."""
        return self.num_components


@dataclass
class FeedForwardBlock(Block):
    """One layer's feed-forward block; a component is a neuron.

    The last neurons may be an implant: linear ones, which together are a low-rank map.

    Args:
        activation (`nn.Module`, *optional*): The activation, where the architecture table names it.
    """

    activation: nn.Module | None = None

    @property
    def implant_rank(self) -> int:
        """Number of linear neurons."""
        return 0 if self.activation is None else vars(self.activation).get("implant_rank", 0)


def weights_by_rows(projection: Projection) -> int:
    """Number of weights and biases behind a projection's outputs."""
    return projection.out_features * (projection.in_features + (projection.module.bias is not None))


def attention_blocks(model: PreTrainedModel) -> list[AttentionBlock]:
    """Lists a model's self-attention blocks (of encoder-decoders: the encoder's), first layer first.

    What is left of a pruned layer is read off its weights and `config.pruned_heads`, so that the view is right for
    fresh, pruned and reloaded models alike.

    Raises:
        ValueError: If the architecture is unknown, or the weights and `config.pruned_heads` contradict each other.
    """
    architecture, config = get_architecture(model), model.config
    total = getattr(config, architecture.config_heads)
    head_size = (
        getattr(config, architecture.config_head_size, None) or config.hidden_size // config.num_attention_heads
    )
    recorded = {str(i): heads for i, heads in (getattr(config, "pruned_heads", None) or {}).items()}
    roles = (architecture.query, architecture.key, architecture.value)
    blocks = []
    for index, path in enumerate(_layer_paths(model, architecture)):
        inputs = find_projections(model.base_model, path, roles)
        (output,) = find_projections(model.base_model, path, (architecture.output,))
        count = inputs[1].out_features // head_size
        kept: Sequence[int] = range(total)
        if count != total:
            kept = [head for head in kept if head not in recorded.get(str(index), ())]
        if count != len(kept):
            raise ValueError(
                f"Layer {index} of {type(model).__name__} has {count} heads, but config.pruned_heads leaves it "
                f"{len(kept)}. Do not edit config.pruned_heads by hand; reload the model from its checkpoint."
            )
        blocks.append(
            AttentionBlock(
                index=index,
                inputs=inputs,
                output=output,
                num_components=count,
                attention=model.base_model.get_submodule(path + architecture.attention),
                kept_heads=kept,
                num_original_heads=total,
                architecture=architecture,
                position_inputs=find_projections(model.base_model, path, architecture.position_inputs, optional=True),
            )
        )
    return blocks


def feed_forward_blocks(model: PreTrainedModel) -> list[FeedForwardBlock]:
    """Lists a model's feed-forward blocks (of encoder-decoders: the encoder's), first layer first.

    Raises:
        ValueError: If the architecture is unknown.
    """
    architecture = get_architecture(model)
    blocks = []
    for index, path in enumerate(_layer_paths(model, architecture)):
        inputs = find_projections(model.base_model, path, architecture.ffn_inputs, optional=True)
        (output,) = find_projections(model.base_model, path, (architecture.ffn_output,))
        sizes = {projection.out_features for projection in inputs}
        if sizes != {output.in_features}:
            raise ValueError(
                f"'{output.name}' of {type(model).__name__} reads {output.in_features} neurons, but "
                f"{[projection.name for projection in inputs]} give {sorted(sizes)}; the entry of "
                f"'{model.config.model_type}' in hap_transformers.ARCHITECTURES does not fit this model."
            )
        activation = architecture.activation
        module = model.base_model.get_submodule(path + activation) if activation else None
        blocks.append(FeedForwardBlock(index, inputs, output, output.in_features, activation=module))
    return blocks


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """A model's layers (of encoder-decoders: the encoder's), first layer first.

    Raises:
        ValueError: If the architecture is unknown.
    """
    paths = _layer_paths(model, get_architecture(model))
    return [model.base_model.get_submodule(path.removesuffix(".")) for path in paths]


def _layer_paths(model: PreTrainedModel, architecture: Architecture) -> list[str]:
    """Path of every layer from the base model, with a final dot."""
    modules, paths = dict(model.base_model.named_modules()), [""]
    for part in architecture.layers.split(".*."):
        lists = [path + part for path in paths]
        missing = [path for path in lists if path not in modules]
        if missing:
            wrapped = getattr(model, "peft_config", None) is not None
            raise ValueError(
                f"{type(model).__name__} has no module {missing[0]!r}, where the layers of a "
                f"'{model.config.model_type}' are expected; this model cannot be scored or pruned."
                + wrapped
                * " Merge its adapters first (`merge_and_unload`)."
            )
        paths = [f"{path}.{i}." for path in lists for i in range(len(modules[path]))]
    return paths
