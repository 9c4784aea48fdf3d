"""The input of every scoring method, `ScoringTask`, and its result for one batch, `Samples`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from ..components.groups import Group
from ..components.sharded import whole_values
from ..memory import is_out_of_memory
from ..number_fields import validate_whole
from ..tokens import device_of_sums
from .batches import ScoredBatch
from .output_curvature import EXACT_DIRECTIONS
from .outputs import loss_of
from .precision import Precision, validate_gradients
from .self_loss import SelfLoss, validate_decoded


LossFunction = Callable[[PreTrainedModel, dict[str, Any]], torch.Tensor]


def model_loss(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Runs a model on a batch, and returns the loss that the model itself computes.

    Without labels it computes none. Then it is the loss against its own outputs ([`SelfLoss`]).

    Raises:
        ValueError: If the model returns no loss, and nothing is known of its outputs, or there is nothing to decode.
    """
    return model_loss_and_outputs(model, inputs)[0]


def model_loss_and_outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Returns what [`model_loss`] does, and the outputs."""
    validate_decoded(model, inputs)
    outputs = model(**inputs)
    loss = loss_of(outputs)
    return SelfLoss().of_outputs(model, outputs, inputs) if loss is None else loss, outputs


@dataclass
class Samples:
    """The result of a method's `sample` function for one batch.

    Columns of `values` are all components of `ScoringTask.groups` in order: first all components of the first group,
    then those of the second, and so on. The mean over all samples of all batches is passed to the method's `finish`
    function. The samples' spread gives standard errors, and their halves the reliability.

    Args:
        values (`torch.Tensor`): Shape `(samples, num_components)`. With `Method.per_example` a sample is one example,
            so `samples` is the batch's size. Otherwise a sample is one random probe, averaged over the batch's
            examples, and batches are weighted by their size.
        num_probes (`int`, *optional*, defaults to 0): Number of random probes behind the values; 0 if they are exact.
            It is only reported, as `Sensitivity.num_probes`.
        sums (`Iterable[torch.Tensor]`, *optional*): Other numbers that the method needs, summed over the batch's
            examples. They are added up over all batches in float64 on the model's device, one tensor after the other:
            an iterator need not hold them all at once. `Method.settle` gets them as one vector,
            `SampleMoments.sums`. The method must then set `Method.num_sums`, its length.
    """

    values: torch.Tensor
    num_probes: int = 0
    sums: Iterable[torch.Tensor] = ()


def validate_directions(num_probes: int, exact_directions: int) -> None:
    """Checks how many directions of the outputs are backpropagated.

    Raises:
        ValueError: If a number is not whole or out of range.
    """
    validate_whole("num_probes", num_probes, 1)
    validate_whole("exact_directions", exact_directions, 0)


@dataclass
class ScoringTask:
    """A model and the components to score: the first argument of a method's functions.

    While `Method.sample` runs, dropout is off, weights are frozen (`requires_grad=False`) and gradients are enabled.
    Call `loss` to run the model on a batch. Then differentiate the loss in activations, or in masks from
    `hap_transformers.sensitivity.masks.masked_components`. Multiply the loss by `precision.scale` before, and divide
    the gradients by it afterwards; the scale prevents underflow in fp16, and is 1 in other precisions.

    Args:
        model (`PreTrainedModel`): The model to score.
        groups (`list[Group]`): The groups to score, for example the heads of one layer, or its neurons. Groups are
            ordered by kind. Each has at least one component.
        loss_fn (`LossFunction`): Takes the model and a batch, returns the batch's mean loss. Methods call
            `loss` instead, which also applies the precision and checks the result.
        num_probes (`int`): Random probes per batch, for methods that use probes.
        precision (`Precision`): The precision of forward passes, and the loss scale.
        seed (`int`): Seed of the probes. Methods call `generator` instead.
        exact_directions (`int`, *optional*, defaults to 16): Directions of an example's outputs up to which all are
            backpropagated, in place of random mixtures.
    """

    model: PreTrainedModel
    groups: list[Group]
    loss_fn: LossFunction
    num_probes: int
    precision: Precision
    seed: int
    exact_directions: int = EXACT_DIRECTIONS

    def __post_init__(self):
        validate_gradients()
        validate_directions(self.num_probes, self.exact_directions)

    @property
    def loss_name(self) -> str:
        """The loss in words, for messages."""
        if self.loss_fn is model_loss:
            return f"the loss of {type(self.model).__name__}"
        return f"the loss '{getattr(self.loss_fn, '__qualname__', type(self.loss_fn).__name__)}'"

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def sums_device(self) -> torch.device:
        """Where sums are kept: the model's device, if it has float64."""
        return device_of_sums(self.device)

    @property
    def counts(self) -> list[int]:
        """Number of components of each group. Their sum is `num_components` in all shapes."""
        return [group.num_components for group in self.groups]

    def columns(self, kind: str) -> slice:
        """Returns the positions of a kind's components among all components.

        Args:
            kind (`str`): Name of the kind, `"heads"` or `"neurons"`. It must be among the scored kinds.
        """
        before = sum(self.counts[: [group.kind.name for group in self.groups].index(kind)])
        return slice(before, before + sum(g.num_components for g in self.groups if g.kind.name == kind))

    @cached_property
    def squared_norms(self) -> torch.Tensor:
        """Squared norm ||w_c||^2 of each component's weights, shape `(num_components,)`, in float32 or better."""
        norms = []
        for group in self.groups:  # Group by group: the squares of all groups would take the memory of a second model.
            weights = [(p, whole_values(p).to(torch.promote_types(p.dtype, torch.float32))) for p in group.parameters]
            norms.append(group.sum_over_components({p: weight**2 for p, weight in weights}))
        return torch.cat(norms)

    def generator(self, batch: ScoredBatch) -> torch.Generator:
        """Returns a new random generator for the probes of a batch, on the model's device.

        Its seed depends only on the task's seed and the batch's number. So the probes are the same for any number of
        processes, and after a resumption.
        """
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + batch.number)

    def loss(self, batch: ScoredBatch) -> torch.Tensor:
        """Runs the model on a batch in the task's precision, and returns the batch's mean loss with its graph.

        Under `torch.no_grad` it has no graph.

        Raises:
            ValueError: If the model cannot run on the batch, the loss does not depend on the model (with gradients
                enabled), or it is not one finite number.
        """
        try:
            with self.precision.autocast():
                loss = self.loss_fn(self.model, dict(batch.inputs))
        except ValueError as error:
            raise ValueError(f"Batch {batch.number}: {error}") from error
        except (IndexError, RuntimeError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            shapes = {name: tuple(v.shape) for name, v in batch.inputs.items() if isinstance(v, torch.Tensor)}
            of_texts = "tokens are in the vocabulary, labels are in range, and inputs are not too long for the model"
            advice = of_texts if "input_ids" in shapes else "inputs have the model's shape, and labels are in range"
            raise ValueError(
                f"The loss of batch {batch.number}, {shapes}, cannot be computed: {error}. Check that {advice}."
            ) from error
        if not isinstance(loss, torch.Tensor):
            raise ValueError(
                f"loss_fn returned a {type(loss).__name__}; it must return the batch's mean loss as a tensor."
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"The loss of batch {batch.number} does not depend on the model's weights or logits. Do not detach "
                "it, and do not compute it under no_grad."
            )
        if loss.numel() != 1 or not torch.isfinite(loss):
            raise ValueError(
                f"The loss of batch {batch.number} is {loss.detach().tolist()}; scoring needs one finite number. "
                "Check the weights and the batch for NaN or infinity, and that labels are in range."
            )
        return loss
