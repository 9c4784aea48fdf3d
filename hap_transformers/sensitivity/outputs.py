"""The loss and the logits among what a model returns, in every form that `Trainer` accepts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


def loss_of(outputs: Any) -> torch.Tensor | None:
    """The loss in a model's outputs: the entry `"loss"` of a mapping, or the first of a tuple if it is one number.

    Logits have a dimension of examples and one of classes, also for one example with one value.
    """
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, tuple | list) and outputs else None
    return first if isinstance(first, torch.Tensor) and first.numel() == 1 and first.ndim < 2 else None


def note_outputs(loss: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
    """Notes in a loss the tensors that it was computed from, for losses of other tensors than the model's outputs."""
    loss.computed_from = outputs  # type: ignore[attr-defined]
    return loss


def noted_outputs(loss: torch.Tensor) -> list[torch.Tensor] | None:
    """What [`note_outputs`] noted, or `None`."""
    return vars(loss).get("computed_from")


def logits_of(outputs: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits in a model's outputs, by name.

    Logits are the floating point tensors with "logits" in their name that gradients reach, also nested ones. Outputs
    without such names (tuples, bare tensors, custom dictionaries) are searched for the tensors that the loss was
    computed from: those that the loss's graph reaches first.

    Args:
        outputs (`Any`): What the model returned: a mapping, a tuple, a tensor, or these nested.
        loss (`torch.Tensor`): The loss, with its graph.

    Returns:
        `dict[str, torch.Tensor]`: Name to tensor. Entries of tuples are named by their position. The dictionary is
            empty if nothing was found.
    """
    tensors, without_graph = named_tensors(outputs).items(), not loss.requires_grad
    found = {
        name: tensor for name, tensor in tensors if tensor is not loss and (tensor.requires_grad or without_graph)
    }
    named = {name: tensor for name, tensor in found.items() if "logits" in name}
    return named or reached_first(loss, found)


@contextmanager
def logits_of_all_tokens(model: PreTrainedModel) -> Iterator[None]:
    """Lets a head that gives logits of labelled tokens alone (`sparse_prediction` of ModernBERT) give those of all.

    The loss is the same, and all examples then have equally many logits.
    """
    sparse = getattr(model, "sparse_prediction", False)
    if sparse:
        model.sparse_prediction = False  # type: ignore[assignment]
    try:
        yield
    finally:
        if sparse:
            model.sparse_prediction = sparse  # type: ignore[assignment]


def named_tensors(outputs: Any) -> dict[str, torch.Tensor]:
    """All floating point tensors in a model's outputs, by the path of names and positions that leads to them."""
    return {".".join(path): tensor for path, tensor in _walk(outputs) if tensor.is_floating_point()}


def tensors_in(outputs: Any) -> list[torch.Tensor]:
    """All tensors in a model's or a layer's outputs."""
    return [tensor for _, tensor in _walk(outputs)]


def _walk(outputs: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    if isinstance(outputs, torch.Tensor):
        yield path, outputs
        return
    entries: Iterable[tuple[Any, Any]] = outputs.items() if isinstance(outputs, Mapping) else ()
    if isinstance(outputs, tuple | list):
        entries = enumerate(outputs)
    for name, value in entries:
        yield from _walk(value, (*path, str(name)))


def reached_first(loss: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that the loss depends on directly, not through another of them."""
    reached = set(graph_nodes(loss, list(tensors.values())))
    return {name: tensor for name, tensor in tensors.items() if tensor.grad_fn in reached}


def graph_nodes(loss: torch.Tensor, ends: Sequence[torch.Tensor] = ()) -> Iterator[Any]:
    """The nodes of a loss's graph, down to those of the tensors `ends`, which are among them."""
    last = {tensor.grad_fn for tensor in ends}
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in last:
            waiting += [following for following, _ in node.next_functions]
