"""`align_heads`: changes the basis inside attention heads, and nothing else."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from ..components.forwards import eager_model
from ..components.groups import Group, find_groups
from ..components.projections import Projection
from ..components.slicing import validate_in_memory, validate_sliceable
from ..efficiency import evaluating
from ..sensitivity.batches import examples_in
from ..sensitivity.by_parts import accumulated
from ..sensitivity.methods import Method
from ..sensitivity.output_curvature import EXACT_DIRECTIONS
from ..sensitivity.precision import Precision, plain_forward
from ..sensitivity.task import LossFunction, ScoringTask, model_loss
from ..surgery.undo import values_undone
from .attention_moments import Attention, attention_moments
from .bases import query_key_bases, value_basis
from .basis_name import ALIGNED_ON, digest, name_basis


# New values of a projection: rows or columns, and the bias.
Change = tuple[Projection, torch.Tensor, torch.Tensor | None]


def align_heads(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_examples: int | None = ALIGNED_ON,
    num_probes: int = 4,
    exact_directions: int = EXACT_DIRECTIONS,
    precision: str | None = None,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> None:
    """Changes the basis of every head's dimensions, in place, so that few of them do most of its work.

    A head's value and output projections only ever appear as a product, and so do its query and key projections. The
    change of basis leaves both products, and so the model's outputs, as they are, to rounding. Value dimensions become
    uncorrelated with a diagonal curvature ([`value_basis`]), query/key dimensions balanced ([`query_key_bases`]). The
    first dimensions of a head are the most important ones. Where rotary embeddings or norms act on queries and keys,
    only value dimensions change. With grouped-query attention bases belong to the key/value heads.

    Score dimensions after this call, for the model as it is then. `config.aligned_heads` names the basis; a plan for
    dimensions fits only the basis that it was made in.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture, pruned before or not.
        batches (`Iterable[Mapping[str, Any]]`): Batches of model inputs; labels are not needed.
        max_examples (`int`, *optional*, defaults to 256): Stop after this many examples.
        num_probes, exact_directions, precision, seed, loss_fn, progress, accelerator: As in [`estimate_sensitivity`].

    Raises:
        ValueError: If the architecture is unknown, weights cannot be changed because they are quantized, sharded or
            shared, there are no examples, a moment is not finite, the dtype does not hold the new weights, or the
            model's outputs change, because its attention is not what its entry in `ARCHITECTURES` says; the model is
            then as it was.

    Example:

    ```python
    align_heads(model, loader)
    kinds = ("query_key_dims", "value_dims", "neurons")
    sensitivity = estimate_sensitivity(model, loader, components=kinds, max_examples=512)
    apply_plan(model, plan_pruning(sensitivity, model, ratio=0.8))
    ```
    """
    model = eager_model(model)
    if accelerator is not None:
        model = accelerator.unwrap_model(model)
        precision = precision or accelerator.mixed_precision
    groups = find_groups(model, ["query_key_dims", "value_dims"])
    validate_sliceable(model, groups)
    validate_in_memory(groups)
    layers = _layers(groups, model)
    if not layers:
        return
    task = ScoringTask(
        model=model,
        groups=[layer.values for layer in layers],
        loss_fn=loss_fn or model_loss,
        num_probes=num_probes,
        precision=Precision(None if precision == "no" else precision, model.device.type),
        seed=seed,
        exact_directions=exact_directions,
    )
    method = Method(
        functools.partial(attention_moments, layers),
        finish=lambda task, means: means,  # type: ignore[arg-type,return-value]
        num_sums=lambda task: sum(sum(layer.lengths()) for layer in layers),
    )
    first: list[Mapping[str, Any]] = []
    seen = _noting_first(batches, first)
    done = accumulated(task, method, "bases of heads", seen, None, max_examples, accelerator, None, progress)
    parts = done.moments.sums.split([sum(layer.lengths()) for layer in layers])
    _validate_finite(model, layers, parts)
    changes = [
        change
        for layer, sums in zip(layers, parts, strict=True)
        for change in _changes(layer, sums, done.moments.num_examples)
    ]
    inputs = send_to_device(dict(first[0]), model.device)
    changed = [parameter for projection, _, _ in changes for parameter in projection.parameters]
    with plain_forward(model), values_undone(changed), _unchanged(model, layers, task, inputs):
        for projection, matrix, bias in changes:
            projection.write(matrix, bias)
        _validate_held(model, changes)
    name_basis(model.config, "value_dims", digest(done.moments.sums))


def _layers(groups: list[Group], model: PreTrainedModel) -> list[Attention]:
    """The layers that have heads left; query/key dimensions only where their basis may change."""
    # In Transformers 4, some models add products of queries and embeddings of distances.
    distances = getattr(model.config, "position_embedding_type", "absolute") != "absolute"
    present = [group for group in groups if group.num_components]
    query_keys = {
        group.layer: group for group in present if not group.readers and group.names.bilinear and not distances
    }
    return [Attention(group, query_keys.get(group.layer)) for group in present if group.readers]


def _validate_finite(model: PreTrainedModel, layers: list[Attention], parts: Sequence[torch.Tensor]) -> None:
    for layer, sums in zip(layers, parts, strict=True):
        if not sums.isfinite().all():
            raise ValueError(
                f"Sums over what the heads of layer {layer.values.layer} of this {type(model).__name__} read and give "
                "are not finite. Check its weights, or take another precision. Nothing was changed."
            )


def _validate_held(model: PreTrainedModel, changes: Sequence[Change]) -> None:
    """Checks that the model's dtype holds the new weights, which are large where contexts hardly vary."""
    for projection, _, _ in changes:
        if not all(parameter.isfinite().all() for parameter in projection.parameters):
            raise ValueError(
                f"The weights of '{projection.name}' of this {type(model).__name__} are too large for "
                f"{projection.module.weight.dtype} in another basis. Give the model in float32 or bfloat16. The model "
                "is as it was."
            )


def _changes(layer: Attention, sums: torch.Tensor, examples: int) -> Iterator[Change]:
    """The projections of one layer in their new bases."""
    count, contexts, curvature, *others = sums.split(layer.lengths())
    yield from _new_values(layer, contexts, curvature.view(2 * (layer.values.reader.out_features,)) / examples, count)
    if layer.query_keys is None:
        return
    queries, keys = (
        features.moments(part, tokens, centred)
        # A softmax does not see what all keys have in common.
        for features, tokens, part, centred in zip(
            layer.queries_and_keys, others[::2], others[1::2], (False, True), strict=True
        )
    )
    maps = [query_key_bases(q, k) for q, k in zip(queries, keys, strict=True)]
    of_queries, of_keys = [first for first, _ in maps], [second for _, second in maps]
    query, key = layer.query_keys.writers
    yield _changed_rows(query, of_queries)
    yield _changed_rows(key, of_keys)
    for follower in layer.query_keys.followers:
        gives_keys = follower.name.endswith(layer.query_keys.names.position_inputs[0])
        yield _changed_rows(follower, of_keys if gives_keys else of_queries)


def _new_values(
    layer: Attention, sums: torch.Tensor, curvature: torch.Tensor, count: torch.Tensor
) -> Iterator[Change]:
    """The value projection, and the output projection that reads the contexts."""
    features, (value,) = layer.contexts, layer.values.writers
    reader = features.projection
    weight = reader.matrix(reader.module.weight).to(curvature)
    maps, columns = [], []
    for moment, W in zip(features.moments(sums, count, reader.has_bias), features.of_heads(weight), strict=True):
        M = torch.einsum("ohs,op,pks->hk", W, curvature, W)
        B, inverse = value_basis(moment, M)
        maps.append(B)
        columns.append(torch.einsum("ohs,hk->oks", W, inverse).flatten(1))
    yield _changed_rows(value, maps)
    yield reader, torch.cat(columns, 1), None


def _changed_rows(writer: Projection, maps: list[torch.Tensor]) -> Change:
    """A projection whose outputs are mapped, head by head."""
    weight = writer.matrix(writer.module.weight).to(maps[0])
    bias = writer.outputs_of(writer.module.bias).to(maps[0])[:, None] if writer.has_bias else None
    left = [len(each) for each in maps]
    shared = len(weight) // sum(left)

    def mapped(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.split([shared * count for count in left])
        mixed = [
            torch.einsum("ij,jsx->isx", each, head.view(len(each), shared, head.shape[1])).flatten(0, 1)
            for each, head in zip(maps, heads, strict=True)
        ]
        return torch.cat(mixed)

    return writer, mapped(weight), None if bias is None else mapped(bias)[:, 0]


def _noting_first(batches: Iterable[Mapping[str, Any]], first: list[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Keeps the first batch that has examples."""
    for number, batch in enumerate(batches):
        if not first and isinstance(batch, Mapping) and examples_in(batch, number):
            first.append(batch)
        yield batch


@contextmanager
def _unchanged(
    model: PreTrainedModel, layers: Sequence[Attention], task: ScoringTask, inputs: dict[str, Any]
) -> Iterator[None]:
    """Checks that what the last output projection gives for a batch is the same afterwards.

    Raises:
        ValueError: If it is not.
    """
    reader = layers[-1].values.reader
    before = _given_by(reader, task, inputs)
    yield
    moved = (_given_by(reader, task, inputs) - before).norm() / before.norm().clamp_min(torch.finfo(before.dtype).tiny)
    if not moved <= torch.finfo(before.dtype).eps ** 0.5:
        remedy = (
            "Its attention does more with queries and keys than to multiply them; set bilinear=False in the names of "
            f"its heads in hap_transformers.ARCHITECTURES['{model.config.model_type}']."
            if any(layer.query_keys for layer in layers)
            else "Its attention does more with values than to average them, such as to clip them (clip_qkv); remove "
            "whole heads, components=['heads', 'neurons']."
        )
        raise ValueError(
            f"The outputs of this {type(model).__name__} would change by {moved:.1e} of their size with another basis "
            f"in its heads. {remedy} The model is as it was."
        )


def _given_by(reader: Projection, task: ScoringTask, inputs: dict[str, Any]) -> torch.Tensor:
    given: list[torch.Tensor] = []
    handle = reader.module.register_forward_hook(lambda module, args, output: given.append(output))
    try:
        with evaluating(task.model), torch.compiler.set_stance("force_eager"):
            task.loss_fn(task.model, dict(inputs))
    finally:
        handle.remove()
    return torch.cat([each.flatten() for each in given])
