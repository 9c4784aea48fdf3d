"""Measures what removing components that are made of others costs, whole layers above all: they go one at a time."""

import torch

from .backward_pass import captured_logits, captured_outputs
from .batches import ScoredBatch
from .masks import masked_components
from .methods import Method
from .output_curvature import curvature_along
from .second_derivatives import named_second_derivatives
from .task import Samples, ScoringTask


def removal_by_removal(task: ScoringTask, batch: ScoredBatch) -> Samples:
    r"""Runs the model without each component, and prices every example's change of outputs by the loss's curvature.

    With the outputs z of an example, z' without the component, and H the Hessian of the example's loss in z,

        1/2 (z' - z)^T H (z' - z).

    A layer is too much for derivatives in its weights or a mask, so the change goes through the network as it is. Only
    the loss is approximated: for squared errors not even that, for cross-entropy to the model's own distribution it is
    the KL divergence to second order. It takes a forward pass a component.

    Returns:
        `Samples`: One sample per example.

    Raises:
        ValueError: If the loss has no curvature in the outputs.
    """
    with masked_components(task, batch) as masks:
        with captured_outputs(task) as captured:
            loss = task.loss(batch)
        outputs = captured_logits(task, captured, loss)
        with named_second_derivatives(task, loss, "logits", outputs):
            price = curvature_along(loss, outputs, batch.size)
        columns = []
        for mask in masks:
            with torch.no_grad():
                mask.zero_()
            with captured_outputs(task) as captured:
                without = captured_logits(task, captured, task.loss(batch))
            with torch.no_grad():
                mask.fill_(1)
            columns.append(price([(z - own).detach() for z, own in zip(without, outputs, strict=True)]) / 2)
    return Samples(torch.stack(columns, 1))


def as_they_are(task: ScoringTask, means: torch.Tensor | None) -> torch.Tensor:
    """Returns the means of single examples' costs."""
    assert means is not None  # Methods with samples receive their mean.
    return means


BY_REMOVAL = Method(
    removal_by_removal, as_they_are, curvature="logits", comparable=True, foresees_refit=True, in_loss_units=True
)
