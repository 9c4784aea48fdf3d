"""Closed-form refit of what pruning has left: no labels, no gradient descent."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .blocks import Block, attention_blocks, feed_forward_blocks
from .efficiency import evaluating
from .projections import Projection
from .slicing import validate_sliceable


def reconstruct(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    ridge: float = 0.01,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> None:
    r"""Refits the output projections of a pruned model so that its residual stream follows the dense model's.

    Block by block in forward order: with X the inputs of a block's output projection in the pruned model as refitted
    so far, and Y the dense model's residual stream after the block minus the pruned model's before it, the projection
    becomes the ridge regression of Y on X,

        W <- W + R^T X (X^T X + lambda I)^-1,    R = Y - X W^T,    lambda = ridge * mean diag(X^T X),

    X and Y centred and the bias taking the means. So each block mends what earlier ones lost, too. Blocks before the
    first pruned one stay as they are. The sums are kept in float64 and take no more memory for more examples; for each
    block, both models run once over the batches up to that block. Layers that share weights are fitted on all their
    calls at once, on what those read before the fit.

    Args:
        model (`PreTrainedModel`): The pruned model; changed in place.
        dense (`PreTrainedModel`): The model it was pruned from, on the same device; only looked at.
        batches (`Iterable[Mapping[str, Any]]`): Inputs, which can be gone through again and again; labels are not
            needed. Tokens that `attention_mask` excludes do not count.
        ridge (`float`, *optional*, defaults to 0.01): Strength of the regularization towards the present weights.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        accelerator (`Accelerator`, *optional*): Shares the batches out between its processes, which must all call
            this with the same batches.

    Raises:
        ValueError: If the models are of different architectures or depths, `ridge` is negative, or there is nothing to
            fit on; the model is then untouched.
    """
    if ridge < 0:
        raise ValueError(f"`ridge` must not be negative, got {ridge}.")
    if iter(batches) is batches:
        raise ValueError(
            "`batches` can be gone through only once, and every block needs them; give a list or DataLoader."
        )
    blocks, originals = _blocks(model), _blocks(dense)
    if [b.output.name for b in blocks] != [b.output.name for b in originals]:
        raise ValueError(
            f"{type(model).__name__} and {type(dense).__name__} have different layers; give the model that was pruned."
        )
    sizes = [
        (block.num_components, original.num_components) for block, original in zip(blocks, originals, strict=True)
    ]
    first = next((i for i, (left, before) in enumerate(sizes) if left != before), len(blocks))
    validate_sliceable(model, blocks[first:])
    with tqdm(total=len(blocks) - first, desc="Refitting", disable=not progress) as bar:
        for number in range(first, len(blocks)):
            sums = _Sums.zeros(blocks[number].output)
            for position, batch in enumerate(batches):
                if accelerator is None or position % accelerator.num_processes == accelerator.process_index:
                    inputs = send_to_device(dict(batch), model.device)
                    targets = _run(dense, originals, number, inputs)
                    for own, target in zip(_run(model, blocks, number, inputs), targets, strict=True):
                        sums.add(own.inputs, target.stream + target.outputs - own.stream, inputs.get("attention_mask"))
            if accelerator is not None:
                sums.reduce(accelerator)
            sums.refit(blocks[number].output, ridge)
            bar.update()


@dataclass
class _Call:
    """What one call of a block's output projection saw; each tensor `(batch, tokens, features)`.

    Args:
        inputs (`torch.Tensor`): What it read.
        stream (`torch.Tensor`): The residual stream that the block adds to.
        outputs (`torch.Tensor`): What it gave.
    """

    inputs: torch.Tensor
    stream: torch.Tensor
    outputs: torch.Tensor


class _Stop(Exception):
    """All that is wanted of a forward pass has been seen."""


def _blocks(model: PreTrainedModel) -> list[Block]:
    """All blocks in forward order."""
    pairs = zip(attention_blocks(model), feed_forward_blocks(model), strict=True)
    return [block for pair in pairs for block in pair]


def _run(model: PreTrainedModel, blocks: list[Block], number: int, inputs: dict[str, Any]) -> list[_Call]:
    """Runs a model as far as one block's last call (layers that share weights are called several times)."""
    block, attention = blocks[number], blocks[number - number % 2]
    architecture = attention.architecture
    layer = attention.output.name.removesuffix("." + architecture.output)
    repeats = len(blocks) // 2 < model.config.num_hidden_layers
    calls: list[_Call] = []
    stream: list[torch.Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream[:] = [args[0] if args else kwargs["hidden_states"]]

    def normalized(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        stream[:] = [args[0]]

    def attended(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        stream[:] = [stream[0] + output]

    def leave(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        calls.append(_Call(args[0], stream[0], output))
        if not repeats:
            raise _Stop

    handles = [model.base_model.get_submodule(layer).register_forward_pre_hook(enter, with_kwargs=True)]
    if block is not attention:
        if architecture.norm_first:
            handles.append(attention.output.module.register_forward_hook(attended))
        else:
            handles.append(block.inputs[0].module.register_forward_pre_hook(normalized))
    handles.append(block.output.module.register_forward_hook(leave))
    try:
        with evaluating(model):
            model(**inputs)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls


@dataclass
class _Sums:
    """Sums over tokens, in float64, from which a projection is refitted.

    Args:
        tokens (`torch.Tensor`): Their number.
        x (`torch.Tensor`): Inputs, shape `(inputs,)`.
        y (`torch.Tensor`): Targets, shape `(outputs,)`.
        xx (`torch.Tensor`): Products of inputs, shape `(inputs, inputs)`.
        xy (`torch.Tensor`): Products of inputs and targets, shape `(inputs, outputs)`.
    """

    tokens: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    xx: torch.Tensor
    xy: torch.Tensor

    @classmethod
    def zeros(cls, output: Projection) -> "_Sums":
        """No tokens yet."""
        inputs, outputs = output.in_features, output.out_features
        shapes = ((), (inputs,), (outputs,), (inputs, inputs), (inputs, outputs))
        return cls(*(output.module.weight.new_zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Adds the tokens of a call, but for padding."""
        x, y = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (x, y))
        if mask is not None and mask.shape == x.shape[:2]:
            x, y = x[mask.bool()], y[mask.bool()]
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        self.tokens += len(x)
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def reduce(self, accelerator: Accelerator) -> None:
        """Adds up the sums of all processes."""
        for name, value in vars(self).items():
            setattr(self, name, accelerator.reduce(value, "sum"))

    def refit(self, output: Projection, ridge: float) -> None:
        """Puts the ridge regression into the projection."""
        if not self.tokens:
            raise ValueError("No tokens to refit on: `batches` is empty, or its masks exclude all.")
        weight, bias = output.module.weight, output.module.bias
        xx, xy = self.xx, self.xy
        if bias is not None:
            xx = xx - torch.outer(self.x, self.x) / self.tokens
            xy = xy - torch.outer(self.x, self.y) / self.tokens
        matrix = output.matrix(weight).double()
        change = _solve(xx, xy - xx @ matrix.T, ridge)
        with torch.no_grad():
            matrix = matrix + change.T
            weight.copy_(matrix.T if isinstance(output.module, Conv1D) else matrix)
            if bias is not None:
                bias.copy_((self.y - matrix @ self.x) / self.tokens)


def _solve(xx: torch.Tensor, xr: torch.Tensor, ridge: float) -> torch.Tensor:
    """Solves (xx + lambda I) B = xr; of all solutions the smallest, where that is singular."""
    if xx.numel() == 0:
        return xr
    regularized = xx + ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    factor, failed = torch.linalg.cholesky_ex(regularized)
    if failed:  # Features that are constant or depend on others, without a ridge.
        return torch.linalg.pinv(regularized, hermitian=True) @ xr
    return torch.cholesky_solve(xr, factor)
