"""Cuts blocks down to some of their components: rows of the projections into them, columns of the one out of them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .groups import AttentionBlock, Block, FeedForwardBlock
from .pruned_modules import fit_modules, set_implant_rank
from .sharded import is_sharded


SLICEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def validate_sliceable(model: PreTrainedModel, blocks: Iterable[Block]) -> None:
    """Checks that the weights of some blocks can be sliced.

    Raises:
        ValueError: If a projection is no plain Linear or Conv1D of floating point weights, is sharded (FSDP), or
            shares its weights with another module.
    """
    users: dict[torch.Tensor, set[str]] = defaultdict(set)
    for path, module in model.base_model.named_modules():
        for parameter in module.parameters(recurse=False):
            users[parameter].add(path)
    for block in blocks:
        for projection in block.sliced:
            module, own = projection.module, dict(projection.module.named_parameters(recurse=False))
            if is_sharded(module):
                raise ValueError(
                    f"Cannot prune {type(model).__name__}: processes have a part of '{projection.name}' each (FSDP). "
                    "Prune before the model is wrapped. Nothing was pruned."
                )
            plain = isinstance(module, nn.Linear | Conv1D) and "weight" in own and own.keys() <= {"weight", "bias"}
            if not plain or any(type(p) is not nn.Parameter or p.dtype not in SLICEABLE for p in own.values()):
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise ValueError(
                    f"Cannot prune {type(model).__name__}: '{projection.name}' is a {kind} of dtype "
                    f"{module.weight.dtype}, and only plain Linear and Conv1D layers can be sliced. Prune before "
                    "quantizing or adding adapters, or merge adapters first. Nothing was pruned."
                )
            for parameter in projection.parameters:
                if others := users[parameter] - {projection.name}:
                    raise ValueError(
                        f"Cannot prune {type(model).__name__}: '{projection.name}' shares a weight with "
                        f"'{min(others)}', which would not fit any more. Untie them first. Nothing was pruned."
                    )


def validate_in_memory(blocks: Iterable[Block]) -> None:
    """Checks that the weights of some blocks are at hand.

    Raises:
        ValueError: If they are offloaded, so that slicing would not reach them.
    """
    for projection in (projection for block in blocks for projection in block.sliced):
        if projection.module.weight.is_meta:
            raise ValueError(
                f"The weights of '{projection.name}' are not in memory but offloaded. Load the model on one device to "
                "prune it. Nothing was pruned."
            )


def keep_components(block: Block, positions: Sequence[int]) -> None:
    """Cuts a block down to the components at some positions, in place.

    Modules stay the same objects; their parameters are replaced by smaller ones of the same dtype, device and
    `requires_grad` (but for those without any element left, which no gradient ever reaches).

    Args:
        block (`Block`): The block, whose weights can be sliced (see [`validate_sliceable`]).
        positions (`Sequence[int]`): Positions among the present components, in the order that they shall have; heads
            in ascending order.
    """
    kept = torch.tensor(positions, dtype=torch.long)
    rows = defaultdict(list)
    *inputs, output = block.sliced
    for projection in inputs:
        own = _runs(kept, projection.out_features // block.num_components)
        rows[projection.module].append(own + projection.part * projection.out_features)
    columns = _runs(kept, output.in_features // block.num_components)
    for module, parts in rows.items():
        _slice(module, torch.cat(parts), outputs=True)
    _slice(output.module, columns, outputs=False)
    before, block.num_components = block.num_components, len(positions)
    if isinstance(block, FeedForwardBlock) and block.implant_rank:
        first = before - block.implant_rank  # The first of the linear neurons, which are the last.
        set_implant_rank(block, sum(position >= first for position in positions))
    if isinstance(block, AttentionBlock):
        block.kept_heads = [block.kept_heads[position] for position in positions]
    fit_modules(block)


def _runs(kept: torch.Tensor, length: int) -> torch.Tensor:
    """Indices of the features of the kept components, of which each has `length`."""
    return (kept[:, None] * length + torch.arange(length)).flatten()


def _slice(module: nn.Linear | Conv1D, index: torch.Tensor, outputs: bool) -> None:
    """Keeps some outputs or inputs of a linear map, whose parameters are replaced."""
    index = index.to(module.weight.device)
    transposed = isinstance(module, Conv1D)
    module.weight = _select(module.weight, int(outputs == transposed), index)
    if outputs and module.bias is not None:
        module.bias = _select(module.bias, 0, index)
    if transposed:
        module.nx, module.nf = module.weight.shape
    else:
        module.out_features, module.in_features = module.weight.shape


def _select(parameter: torch.Tensor, dim: int, index: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, index), requires_grad=parameter.requires_grad)
