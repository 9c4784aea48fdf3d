"""`align_embeddings`: writes word embeddings in a basis whose dimensions can be left out."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..components.architectures import get_architecture
from ..components.embedding_dims import NAME, refuses, split
from ..components.forwards import eager_model
from ..components.groups import Group, find_groups, kinds_in_use
from ..components.slicing import validate_in_memory, validate_sliceable
from ..components.structure import record_structure
from ..sensitivity.by_parts import accumulated
from ..sensitivity.kronecker import moment_and_curvature
from ..sensitivity.methods import get_method
from ..sensitivity.output_curvature import EXACT_DIRECTIONS
from ..sensitivity.precision import Precision
from ..sensitivity.task import LossFunction, ScoringTask, model_loss
from ..surgery.undo import undone_on_error, values_undone
from .bases import value_basis
from .basis_name import ALIGNED_ON, digest, name_basis


# Weight of all tokens of the vocabulary alike, beside the tokens of the examples as often as they are there.
SMOOTHING = 0.05


def align_embeddings(
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
    r"""Writes a model's word embeddings as a table times a square map, in place, the most important dimensions first.

    Let token t have the embedding e_t and the weight n_t, how often it is in the examples; a share of all weights
    goes to all tokens alike. Let C be the second moment of the cotangents of embeddings. The map of rank r that
    minimises

        sum_t n_t (e_t - f_t)^T C (e_t - f_t)

    keeps the first r dimensions. Half of what a dimension adds to this sum is the loss that its removal costs, to
    second order. The model's outputs stay as they are, to rounding, and it has the weights of the map more until
    dimensions are removed ([`apply_plan`]). A plan that removes none multiplies table and map again.

    Embeddings of positions and types of tokens stay. `config.aligned_embeddings` names the basis.

    Args:
        model (`PreTrainedModel`): A model whose word embeddings are not tied, pruned before or not.
        batches (`Iterable[Mapping[str, Any]]`): Batches of model inputs; labels are not needed.
        max_examples (`int`, *optional*, defaults to 256): Stop after this many examples.
        num_probes, exact_directions, precision, seed, loss_fn, progress, accelerator: As in [`estimate_sensitivity`].

    Raises:
        ValueError: If the architecture is unknown or has no word embeddings, these are tied, quantized or sharded,
            there are no examples, or a moment is not finite; the model is then as it was.
    """
    model = eager_model(model)
    if accelerator is not None:
        model = accelerator.unwrap_model(model)
        precision = precision or accelerator.mixed_precision
    validate_separate(model)
    (group,) = find_groups(model, [NAME])
    validate_sliceable(model, [group])
    validate_in_memory([group])
    (table,) = group.writers
    with undone_on_error(model), values_undone(table.parameters):
        if not group.is_split:
            split(group)
        task = ScoringTask(
            model=model,
            groups=[group],
            loss_fn=loss_fn or model_loss,
            num_probes=num_probes,
            precision=Precision(None if precision == "no" else precision, model.device.type),
            seed=seed,
            exact_directions=exact_directions,
        )
        name = "basis of embeddings"
        method = get_method("kronecker")
        done = accumulated(task, method, name, batches, None, max_examples, accelerator, None, progress)
        if not done.moments.sums.isfinite().all():
            raise ValueError(
                f"Sums over the embeddings of this {type(model).__name__} are not finite. Check its weights, or give "
                "the model in float32. Nothing was changed."
            )
        moment, curvature = moment_and_curvature(group, done.moments.sums, done.moments.num_examples)
        _change_basis(group, moment, curvature)
        record_structure(model, find_groups(model, kinds_in_use(model, [NAME])), [group])
        name_basis(model.config, NAME, digest(done.moments.sums))


def validate_separate(model: PreTrainedModel) -> None:
    """Checks that a model's embeddings can be of lower rank.

    Raises:
        ValueError: If they cannot.
    """
    architecture = get_architecture(model)
    unnamed = "its entry in hap_transformers.ARCHITECTURES names none" if NAME not in architecture.names else None
    if reason := unnamed or refuses(model, architecture):
        raise ValueError(f"The {NAME} of this {type(model).__name__} must stay: {reason}. Nothing was changed.")


def _change_basis(group: Group, moment: torch.Tensor, curvature: torch.Tensor) -> None:
    """Writes the table and its map in the basis in which dimensions are uncorrelated and have diagonal curvature."""
    (table,), reader = group.writers, group.reader
    rows = table.module.weight.detach().to(moment)
    uniform = rows.T @ rows / len(rows)
    B, inverse = value_basis((moment + SMOOTHING * uniform) / (1 + SMOOTHING), curvature)
    reader.write(reader.module.weight.detach().to(moment) @ inverse, None)
    table.write(B @ rows.T, None)
