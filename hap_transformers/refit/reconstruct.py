"""Closed-form refit of what pruning has left: no labels, no gradient descent."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..components.forwards import eager_model, validate_forwards
from ..components.groups import Group, kinds_in_use
from ..components.slicing import validate_writable
from ..memory import memory_limit
from ..sensitivity.batches import examples_in
from ..sensitivity.precision import plain_forward
from ..surgery.implants import set_input_map
from ..surgery.undo import values_undone
from ..tokens import has_tokens, mask_of
from .dense_copy import own_refitted
from .emptied_layers import ends_of_emptied, in_front
from .filters import fit_filters
from .kept_values import KeptValues, default_limit
from .layer_runs import Call, ForwardFunction, LayerRuns, is_refitted, precision_of_runs
from .least_squares import Sums
from .reduced_rank import reduced_rank_regression
from .ridge import ridge_of
from .written import writers_of, written_into


def reconstruct(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    ridge: float | None = None,
    init_implants: Collection[int] = (),
    forward: ForwardFunction | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
    max_memory: int | str | None = None,
    precision: str | None = None,
) -> None:
    r"""Refits the projections of a pruned model so that its residual stream follows the dense model's.

    Group by group in forward order, each output projection is refitted by ridge regression. Its inputs X are the
    pruned block's activations, with all earlier groups refitted. The target Y is the dense model's residual stream
    after the block minus the pruned model's before it:

        W <- W + R^T X (X^T X + lambda I)^-1,    R = Y - X W^T,    lambda = ridge * mean diag(X^T X),

    X and Y are centred and the bias takes the means. So each block also makes up for what earlier ones lost. Before
    that, the projections into the block (queries, keys, values, neurons) are refitted alike: on what the pruned
    model's block reads, they shall give what they give on what the dense model's block reads. Blocks before the first
    pruned one stay as they are. Where blocks add to the stream and whole layers are emptied, the output projection in
    front of them follows the dense model's stream behind them.

    The sums are kept in float64. For every batch the residual stream at one layer is kept for either model, and what
    the dense model's blocks read there, so all passes together take about two of the dense model and four of the
    pruned one. Beyond `max_memory` these are kept in temporary files. Layers that share weights are fitted on all
    their calls at once, on the inputs from before the fit.

    Args:
        model (`PreTrainedModel`): The pruned model; changed in place.
        dense (`PreTrainedModel`): The model it was pruned from, on the same device; only read. It may share
            parameters with the pruned one ([`sharing_copy`]): it gets its own of those that the refit writes into.
        batches (`Iterable[Mapping[str, Any]]`): Inputs; labels are not needed. Tokens that `attention_mask` excludes
            do not count.
        ridge (`float`, *optional*): Strength of the regularization towards the present weights. By default 0.01, and 1
            for causal language models.
        init_implants (`Collection[int]`, *optional*): Layers whose implants are made anew, whatever they were before:
            of neurons the low-rank maps of their block's input that explain most of what its kept neurons miss, of
            channels the 1x1 filters that come nearest to what the dense filters give.
        forward (`Callable`, *optional*): Takes a model and a batch and runs the model on it, for batches that are not
            just the model's inputs. By default `model(**batch)`.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        accelerator (`Accelerator`, *optional*): Shares the batches out between its processes, which must all call
            this with the same batches.
        max_memory (`int` or `str`, *optional*): Bytes, such as `"4GB"`, of batches and hidden states to hold in memory
            between passes. The others are written to the folder for temporary files. By default 512 MB on a processor,
            on a GPU a quarter of what is free there.
        precision (`str`, *optional*): `"bf16"` to run forward passes in bfloat16. By default that of `accelerator`, or
            else the model's own. `"no"` and `"fp16"`, whose range is too small for targets, are the model's own. Sums
            and solutions are the same in all.

    Raises:
        OSError: If the temporary files need more room than there is; the model is then as it was.
        ValueError: If the models are of different architectures or depths, a forward was replaced, `ridge` is
            negative, `precision` is unknown, there is nothing to fit on, or a sum is not finite; the model is then as
            it was.
    """
    model, dense = eager_model(model), eager_model(dense)
    ridge = ridge_of(model, ridge)
    validate_forwards(model)
    validate_forwards(dense)
    precise = precision_of_runs(precision, accelerator, model)
    with KeptValues(memory_limit(max_memory) or default_limit(model.device)) as kept:
        pruned = LayerRuns(model, kept, forward, precision=precise)
        original = LayerRuns(dense, kept, forward, kinds_in_use(model), precise)
        sites = _own_sites(pruned, original)
        count = keep_share(batches, kept, accelerator)

        def numbered() -> Iterator[tuple[int, dict[str, Any]]]:
            for position in range(count):
                yield position, send_to_device(kept["batch", position], model.device)

        bar = tqdm(total=len(sites), desc="Refitting", disable=None if progress else True)
        ends, seen_to = ends_of_emptied(pruned, original), -1
        with plain_forward(model), plain_forward(dense), values_undone(written(sites)), bar:
            for layer in range(sites[0].block if sites else len(pruned.layers), len(pruned.layers)):
                unseen = range(max(layer, seen_to + 1), ends.get(layer, layer) + 1)
                for position, inputs in numbered() if unseen else ():
                    _keep_seen(pruned, original, kept, position, inputs, unseen)
                seen_to = max(seen_to, *unseen, -1)
                for place, group in enumerate(pruned.of_layer(layer)):
                    if not any(group is site for site in sites) or not group.reader.out_features:
                        continue  # All that it wrote may be gone.
                    if writers := writers_of(group):
                        read = Sums.zeros(writers[0], outputs=writers[0].in_features)
                        for position, inputs in numbered():
                            reads, wanted = pruned.reads(position, inputs, group), kept["block_inputs", position]
                            for found, target in zip(reads, wanted[layer][place], strict=True):
                                read.add(found, target, mask_of(inputs, group.decoded))
                        _reduced(read, accelerator)
                        filters = group.layer in init_implants and not group.kind.linear_implants
                        _refit_writers(group, read, ridge, same_group(group, original) if filters else None)
                    new_rank = group.implant_rank if group.kind.linear_implants and group.layer in init_implants else 0
                    sums = Sums.zeros(group.reader, _num_inputs(group, new_rank))
                    outputs = outputs_left(group, pruned, original)
                    for position, inputs in numbered():
                        calls = pruned.calls(position, inputs, group)
                        for call, target in zip(calls, kept["total", position][layer][place], strict=True):
                            x = _inputs_of(call, group, new_rank)
                            sums.add(x, call.missing(target[..., outputs]), mask_of(inputs, group.decoded))
                    _reduced(sums, accelerator)
                    _refit(group, sums, new_rank, ridge)
                    bar.update()


def keep_share(batches: Iterable[Mapping[str, Any]], kept: KeptValues, accelerator: Accelerator | None) -> int:
    """Keeps the batches of this process under their positions, where every pass finds them; returns their number.

    Those without examples, or of nothing but padding, are left out.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    count = 0
    for number, batch in enumerate(batches):
        if number % world == rank and examples_in(batch, number) and has_tokens(batch):
            kept["batch", count] = dict(batch)
            count += 1
    return count


def _own_sites(pruned: LayerRuns, original: LayerRuns) -> list[Group]:
    """The groups to refit, whose weights the dense model does not share."""
    sites = sites_to_refit(pruned, original)
    validate_writable(pruned.model, sites)
    own_refitted(sites, original.groups[len(original.groups) - len(sites) :])
    return sites


def _keep_seen(
    pruned: LayerRuns, original: LayerRuns, kept: KeptValues, position: int, inputs: dict[str, Any], layers: range
) -> None:
    """Keeps what the dense model's blocks read for a batch, and the streams that the pruned model's shall give.

    Args:
        layers (`range`): A layer, and the emptied ones behind it. Its last reader aims at the stream behind these.
    """
    seen = {layer: original.calls_of_layer(position, inputs, layer) for layer in layers}
    kept["block_inputs", position] = {
        layer: [[call.block_inputs for call in calls] for calls in found] for layer, found in seen.items()
    }
    totals = {layer: [[call.total for call in calls] for calls in found] for layer, found in seen.items()}
    if len(layers) > 1:
        place = [group is in_front(pruned, layers[0]) for group in pruned.of_layer(layers[0])].index(True)
        # OPT's feed-forward blocks see the tokens of all texts as rows of one matrix, its attention does not.
        behind = zip(totals[layers[0]][place], totals[layers[-1]][-1], strict=True)
        totals[layers[0]][place] = [total.view_as(own) for own, total in behind]
    kept["total", position] = totals


def sites_to_refit(pruned: LayerRuns, original: LayerRuns) -> list[Group]:
    """The pruned model's groups in forward order, from the first that pruning has changed.

    Raises:
        ValueError: If the models have different layers, are one, or the pruned one has what the dense one lacks.
    """
    if pruned.model is original.model:
        raise ValueError("`dense` is the pruned model itself; give a copy that was made before pruning.")
    both = [[group.reader.name for group in runs.groups] for runs in (pruned, original)]
    if both[0] != both[1]:
        names = [type(runs.model).__name__ for runs in (pruned, original)]
        raise ValueError(f"{names[0]} and {names[1]} have different layers; give the model that was pruned.")
    for left, before in zip(pruned.all_groups, original.all_groups, strict=True):
        if left.num_components > before.num_components:
            raise ValueError(
                f"Layer {left.layer} of the pruned model has {left.num_components} {left.kind.name}, that of `dense` "
                f"{before.num_components}. Give the pruned model first, and as `dense` the one it was pruned from."
            )
    changed = (
        place
        for place, (left, before) in enumerate(zip(pruned.all_groups, original.all_groups, strict=True))
        if (left.num_components, left.implant_rank) != (before.num_components, before.implant_rank)
        or any(projection.narrow is not None for projection in left.readers)
    )
    first = next(changed, len(pruned.all_groups))
    for layer, last in ends_of_emptied(pruned, original).items():
        front = in_front(pruned, layer)
        place = next(place for place, group in enumerate(pruned.all_groups) if group is front)
        if place < first < len(pruned.all_groups) and pruned.all_groups[first].block in range(layer + 1, last + 1):
            first = place
    return [group for group in pruned.all_groups[first:] if is_refitted(group)]


def same_group(group: Group, runs: LayerRuns) -> Group:
    """The group of another model that is of the same kind and layer."""
    return next(other for other in runs.all_groups if (other.kind, other.layer) == (group.kind, group.layer))


def outputs_left(group: Group, pruned: LayerRuns, original: LayerRuns) -> slice | list[int]:
    """Of what the dense model's reader gives, what the pruned one's does: it may write another group's components."""
    for now, before in zip(pruned.all_groups, original.all_groups, strict=True):
        if any(writer.module is group.reader.module for writer in now.writers):
            return [list(before.kept).index(number) for number in now.kept]
    return slice(None)


def _reduced(sums: Sums, accelerator: Accelerator | None) -> None:
    """Adds up the sums of all processes.

    Raises:
        ValueError: If there are no tokens.
    """
    if accelerator is not None:
        sums.reduce(accelerator)
    if not sums.tokens:
        raise ValueError(
            "No tokens to refit on: `batches` is empty (a generator can be read only once), or its masks exclude all."
        )


def _refit_writers(group: Group, read: Sums, ridge: float, dense: Group | None) -> None:
    """Fits what reads the residual stream, and new 1x1 filters in it if the dense model's group is given."""
    for writer in writers_of(group):
        read.with_targets_of(writer).refit(writer, ridge)
    if dense is not None:
        fit_filters(group, dense, read, ridge)


def _num_inputs(group: Group, new_rank: int) -> int:
    """Features that are summed over: a new implant is fitted on the block's input."""
    return group.num_components - new_rank + group.writers[-1].in_features if new_rank else group.reader.in_features


def _inputs_of(call: Call, group: Group, new_rank: int) -> torch.Tensor:
    if not new_rank:
        return call.inputs
    kept = call.inputs[..., : group.num_components - new_rank]
    return torch.cat([kept, cast(torch.Tensor, call.block_inputs)], -1)


def _refit(group: Group, sums: Sums, new_rank: int, ridge: float) -> None:
    """Fits a group's reader, and a new implant before it."""
    if new_rank:
        centred = sums.products(group.reader.has_bias)
        A = reduced_rank_regression(*centred, new_rank, group.num_components - new_rank, ridge)
        set_input_map(group, A)
        sums = sums.with_map(A)
    sums.refit(group.reader, ridge, group.norm)


def written(groups: list[Group]) -> list[torch.Tensor]:
    """The weights that a refit changes, each once: projections may share a fused weight."""
    values = (value for group in groups for projection in written_into(group) for value in projection.values)
    return list({id(value): value for value in values}.values())
