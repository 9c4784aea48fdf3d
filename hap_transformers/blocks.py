"""A uniform view of a model's attention blocks, through the architecture table."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .architectures import Architecture, get_architecture


@dataclass
class AttentionBlock:
    """One layer's attention, seen the same way in every architecture.

    Args:
        index (`int`): Number of the layer.
        name (`str`): Path of the attention module from `model.base_model`.
        attention (`nn.Module`): The module that splits its input into heads.
        query, key, value (`nn.Linear`): The projections whose rows belong to the heads.
        output (`nn.Linear`): The projection whose columns belong to the heads.
        head_dim (`int`): Rows (and columns) a head owns in each projection.
        kept_heads (`list[int]`): The heads still there, by their number in the original model.
        num_original_heads (`int`): Heads the original model had here.
        architecture (`Architecture`): The table entry the block was read through.
    """

    index: int
    name: str
    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    head_dim: int
    kept_heads: list[int]
    num_original_heads: int
    architecture: Architecture

    @property
    def num_heads(self) -> int:
        """Number of heads still there."""
        return len(self.kept_heads)

    @property
    def projections(self) -> dict[str, nn.Linear]:
        """The four resizable projections by their path from `model.base_model`."""
        prefix = self.name.removesuffix(self.architecture.attention)
        names = {role: prefix + getattr(self.architecture, role) for role in ("query", "key", "value", "output")}
        return {name: getattr(self, role) for role, name in names.items()}

    def head_parameters(self) -> list[tuple[nn.Parameter, int]]:
        """The weights that heads own, each with the dimension along which the heads lie.

        The output projection's bias belongs to no head.
        """
        rows = [p for linear in (self.query, self.key, self.value) for p in (linear.weight, linear.bias)]
        return [(p, 0) for p in rows if p is not None] + [(self.output.weight, 1)]

    def sum_over_heads(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Sums tensors shaped like `head_parameters()` into one number a head, shape `(num_heads,)`."""
        total = torch.zeros(self.num_heads, dtype=tensors[0].dtype, device=tensors[0].device)
        for tensor, (_, dim) in zip(tensors, self.head_parameters(), strict=True):
            total = total + tensor.movedim(dim, 0).reshape(self.num_heads, -1).sum(1)
        return total

    def weights_per_head(self) -> int:
        """Number of weights one head owns (p_c)."""
        return sum(p.numel() for p, _ in self.head_parameters()) // self.num_heads


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
    blocks = []
    for index, layer in enumerate(model.base_model.get_submodule(architecture.layers)):
        query, key, value, output = (
            layer.get_submodule(getattr(architecture, role)) for role in ("query", "key", "value", "output")
        )
        count = query.weight.shape[0] // head_dim
        kept = list(range(total))
        if count != total:
            kept = [head for head in kept if head not in recorded.get(index, ())]
        if count != len(kept):
            raise ValueError(
                f"Layer {index} of {type(model).__name__} has {count} heads, but config.pruned_heads leaves it "
                f"{len(kept)}. Do not edit config.pruned_heads by hand; reload the model from its checkpoint."
            )
        name = f"{architecture.layers}.{index}.{architecture.attention}"
        attention = layer.get_submodule(architecture.attention)
        blocks.append(
            AttentionBlock(index, name, attention, query, key, value, output, head_dim, kept, total, architecture)
        )
    return blocks
