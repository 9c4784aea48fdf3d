"""Dimensions of word embeddings as components.

A table of embeddings E (tokens x width) of low rank is U B: a table U with fewer dimensions, and a map B that all
tokens share. A dimension owns a column of U and a row of B. The dense model has no B; with all dimensions it is not
worth its weights. So a group is split before it loses any, and joined again if it has lost none.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .architectures import Architecture
from .groups import Group, Kind, register_kind
from .names import EmbeddingNames
from .projections import STORED_AS, Conv1DProjection, Projection
from .subclasses import cached, dense_class, subclass, take_class


NAME = "embedding_dims"
# Name of B inside the table's module.
MAP = "map"


class EmbeddingTable(Conv1DProjection):
    """Embeddings as a linear map of tokens, which is stored as that of GPT-2 is: (tokens, dimensions)."""

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The table."""
        return [self.module.weight]

    @property
    def has_bias(self) -> bool:
        """Always false."""
        return False

    def _note_sizes(self) -> None:
        """Does nothing: the module gives embeddings as wide as before."""


STORED_AS[nn.Embedding] = EmbeddingTable


def find(model: PreTrainedModel, architecture: Architecture) -> list[Group]:
    """The dimensions of a model's word embeddings: one group, which counts to layer 0."""
    names: EmbeddingNames = architecture.names[NAME]
    table = EmbeddingTable(names.table, model.base_model.get_submodule(names.table))
    count = table.out_features
    group = Group(EMBEDDING_DIMS, 0, [table], [], [], range(count), count, whole=count)
    _note_map(group)
    return [group]


def _note_map(group: Group) -> None:
    """Makes the map of a table that has one the group's reader."""
    (table,) = group.writers
    inside = dict(table.module.named_children())
    group.readers = [Projection(f"{table.name}.{MAP}", inside[MAP])] if MAP in inside else []
    if group.readers:
        group.whole = group.reader.out_features


def split(group: Group) -> None:
    """Puts the identity behind the table."""
    (table,) = group.writers
    module, weight = table.module, table.module.weight
    with torch.device(weight.device):
        added = nn.Linear(group.num_components, group.num_components, bias=False, dtype=weight.dtype)
    nn.init.eye_(added.weight)
    module.add_module(MAP, added.requires_grad_(weight.requires_grad))
    take_class(module, _mapped(dense_class(module)))
    _note_map(group)


def join(group: Group) -> None:
    """Multiplies the table by its map, which is removed."""
    (table,) = group.writers
    module, weight = table.module, table.module.weight
    whole = F.linear(weight.detach().double(), group.reader.module.weight.detach().double())
    module.weight = nn.Parameter(whole.to(weight.dtype), weight.requires_grad)
    delattr(module, MAP)
    take_class(module, dense_class(module))
    vars(module).pop("was_cut", None)
    _note_map(group)


@cached
def _mapped(table_class: type[nn.Module]) -> type[nn.Module]:
    """Subclasses a table of embeddings that has a map behind it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.map(table_class.forward(self, input))

    return subclass("Mapped", table_class, forward, _mapped, table_class)


def refuses(model: PreTrainedModel, architecture: Architecture) -> str | None:
    """Why the embeddings of a model cannot be of lower rank, if they cannot."""
    name = architecture.names[NAME].table
    table = model.base_model.get_submodule(name)
    if dense_class(table) is not nn.Embedding or table.max_norm is not None:
        return f"'{name}' is a {dense_class(table).__name__} that does more than to look embeddings up"
    own = (name, f"{model.base_model_prefix}.{name}")
    others = [  # Also where the module itself is in several places.
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if path not in own and any(p is table.weight for p in module.parameters(recurse=False))
    ]
    if others:
        return (
            f"'{name}' shares its weights with '{others[0]}'. What a dimension is worth to embeddings of tokens is "
            "not what it is worth there. Untie them first (tie_word_embeddings=False)"
        )
    return None


def validate_resizable(model: PreTrainedModel) -> None:
    """Checks that a model's word embeddings can be resized: Transformers would drop the map behind the table.

    Raises:
        ValueError: If they are of lower rank.
    """
    if (behind := dict(model.get_input_embeddings().named_children()).get(MAP)) is not None:
        raise ValueError(
            f"The word embeddings of this {type(model).__name__} are of rank {behind.in_features}, and "
            "resize_token_embeddings would put plain ones in their place. Resize the dense model, and prune it then. "
            "To remove tokens, use trim_vocabulary. Nothing was changed."
        )


EMBEDDING_DIMS = Kind(
    name=NAME,
    singular="embedding dimension",
    label="dimensions of word embeddings",
    find=find,
    fit=lambda group: None,
    floor=0.05,
    floor_is_share=True,
    step=8,
    basis="aligned_embeddings",
    outside=True,
    split=split,
    join=join,
    refuses=refuses,
)
register_kind(EMBEDDING_DIMS)
