"""Closed-form refit of what pruning has left: no labels, no gradient descent."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..components.groups import Block, FeedForwardBlock
from ..components.projections import Projection
from ..components.slicing import validate_sliceable
from ..surgery.implants import reduced_rank_regression, set_input_map
from ..tokens import products, valid_tokens
from .layer_runs import ForwardFunction, LayerRuns
from .ridge import solve_ridge


def reconstruct(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    ridge: float = 0.01,
    init_implants: Collection[int] = (),
    forward: ForwardFunction | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> None:
    r"""Refits the output projections of a pruned model so that its residual stream follows the dense model's.

    Block by block in forward order: with X the inputs of a block's output projection in the pruned model as refitted
    so far, and Y the dense model's residual stream after the block minus the pruned model's before it, the projection
    becomes the ridge regression of Y on X,

        W <- W + R^T X (X^T X + lambda I)^-1,    R = Y - X W^T,    lambda = ridge * mean diag(X^T X),

    X and Y centred and the bias taking the means. So each block mends what earlier ones lost, too. Blocks before the
    first pruned one stay as they are. The sums are kept in float64. Of every batch the residual stream at one layer is
    kept for either model, so that all passes together take about two of the dense model and three of the pruned one.
    Layers that share weights are fitted on all their calls at once, on what those read before the fit.

    Args:
        model (`PreTrainedModel`): The pruned model; changed in place.
        dense (`PreTrainedModel`): The model it was pruned from, on the same device; only looked at.
        batches (`Iterable[Mapping[str, Any]]`): Inputs; labels are not needed. Tokens that `attention_mask` excludes
            do not count.
        ridge (`float`, *optional*, defaults to 0.01): Strength of the regularization towards the present weights.
        init_implants (`Collection[int]`, *optional*): Layers whose implants become the low-rank maps of their block's
            input that explain most of what its kept neurons miss, whatever they were before.
        forward (`Callable`, *optional*): Takes a model and a batch and runs the model on it, for batches that are not
            just the model's inputs. By default `model(**batch)`.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        accelerator (`Accelerator`, *optional*): Shares the batches out between its processes, which must all call
            this with the same batches.

    Raises:
        ValueError: If the models are of different architectures or depths, `ridge` is negative, there is nothing to
            fit on, or something is not finite; the model is then as it was.
    """
    if ridge < 0:
        raise ValueError(f"`ridge` must not be negative, got {ridge}.")
    pruned, original = LayerRuns(model, forward), LayerRuns(dense, forward)
    if [block.output.name for block in pruned.blocks] != [block.output.name for block in original.blocks]:
        raise ValueError(
            f"{type(model).__name__} and {type(dense).__name__} have different layers; give the model that was pruned."
        )
    both = list(zip(pruned.blocks, original.blocks, strict=True))
    changed = (
        i
        for i, (left, before) in enumerate(both)
        if left.num_components != before.num_components or (i % 2 and left.implant_rank != before.implant_rank)
    )
    first = next(changed, len(both))
    validate_sliceable(model, pruned.blocks[first:])

    # A list, as every pass must meet the same batches in the same places; they are smaller than what is kept of them.
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    own = [dict(batch) for position, batch in enumerate(batches) if position % world == rank]

    def own_batches() -> Iterator[tuple[int, dict[str, Any]]]:
        for position, batch in enumerate(own):
            yield position, send_to_device(batch, model.device)

    bar = tqdm(total=len(both) - first, desc="Refitting", disable=None if progress else True)
    with _put_back_on_error(pruned.blocks[first:]), bar:
        for layer in range(first // 2, len(pruned.layers)):
            targets = {
                position: [[call.stream + call.outputs for call in calls] for calls in seen]
                for position, inputs in own_batches()
                for seen in [original.calls_of_layer(position, inputs, layer)]
            }
            for number in range(max(2 * layer, first), 2 * layer + 2):
                block = pruned.blocks[number]
                has_new = isinstance(block, FeedForwardBlock) and layer in init_implants
                rank = block.implant_rank if has_new else 0
                neurons = block.num_components - rank
                sums = _Sums.zeros(block.output, rank and neurons + block.inputs[-1].in_features)
                for position, inputs in own_batches():
                    calls = pruned.calls(position, inputs, number)
                    for call, target in zip(calls, targets[position][number % 2], strict=True):
                        x = call.inputs
                        if rank:
                            x = torch.cat([x[..., :neurons], cast(torch.Tensor, call.block_inputs)], -1)
                        sums.add(x, target - call.stream, inputs.get("attention_mask"))
                if accelerator is not None:
                    sums.reduce(accelerator)
                if not sums.tokens:
                    raise ValueError("No tokens to refit on: `batches` is empty, or its masks exclude all.")
                if isinstance(block, FeedForwardBlock) and rank:
                    centred = sums.products(block.output.module.bias is not None)
                    A = reduced_rank_regression(*centred, rank, neurons, ridge)
                    set_input_map(block, A)
                    sums = sums.with_map(A)
                sums.refit(block.output, ridge)
                bar.update()


@contextmanager
def _put_back_on_error(blocks: list[Block]) -> Iterator[None]:
    """Gives blocks the weights back that a refit changes, if it fails or is interrupted."""
    implanted = [block.inputs for block in blocks if isinstance(block, FeedForwardBlock) and block.implant_rank]
    projections = [block.output for block in blocks] + [projection for inputs in implanted for projection in inputs]
    before = [(p, p.detach().clone()) for projection in projections for p in projection.parameters]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
        raise


@dataclass
class _Sums:
    """Sums over tokens, in float64 and where there is float64, from which a projection is refitted.

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
    def zeros(cls, output: Projection, inputs: int = 0) -> "_Sums":
        """No tokens yet, of so many inputs or by default the projection's."""
        inputs, outputs = inputs or output.in_features, output.out_features
        shapes = ((), (inputs,), (outputs,), (inputs, inputs), (inputs, outputs))
        device = output.module.weight.device
        device = torch.device("cpu") if device.type == "mps" else device  # Apple's GPUs have no float64.
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Adds the tokens of a call, but for padding."""
        x, y = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (x, y))
        x, y = (valid_tokens(tensor, mask).to(self.x.device) for tensor in (x, y))
        self.tokens += len(x)
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        self.xx += products(x)
        self.xy += x.T @ y

    def reduce(self, accelerator: Accelerator) -> None:
        """Adds up the sums of all processes."""
        for name, value in vars(self).items():
            setattr(self, name, accelerator.reduce(value, "sum"))

    def with_map(self, A: torch.Tensor) -> "_Sums":
        """The sums for inputs whose last features went through a linear map, shape `(features after, before)`."""
        kept = len(self.x) - A.shape[1]

        def mapped(sums: torch.Tensor) -> torch.Tensor:
            return torch.cat([sums[:kept], A @ sums[kept:]])

        return _Sums(self.tokens, mapped(self.x), self.y, mapped(mapped(self.xx).T), mapped(self.xy))

    def products(self, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Products of inputs with inputs and with targets."""
        if not centred:
            return self.xx, self.xy
        return (
            self.xx - torch.outer(self.x, self.x) / self.tokens,
            self.xy - torch.outer(self.x, self.y) / self.tokens,
        )

    def refit(self, output: Projection, ridge: float) -> None:
        """Puts the ridge regression into the projection."""
        weight, bias = output.module.weight, output.module.bias
        xx, xy = self.products(centred=bias is not None)
        if not (xx.isfinite().all() and xy.isfinite().all()):
            raise ValueError(
                f"What '{output.name}' reads, or should give, is not finite. Check the weights and the batches "
                "for NaN or infinity. The model was not refitted."
            )
        matrix = output.matrix(weight).to(xx.device).double()
        change = solve_ridge(xx, xy - xx @ matrix.T, ridge)
        with torch.no_grad():
            matrix = matrix + change.T
            weight.copy_((matrix.T if isinstance(output.module, Conv1D) else matrix).to(weight.dtype))
            if bias is not None:
                bias.copy_(((self.y - matrix @ self.x) / self.tokens).to(bias.dtype))
