"""Aligns whatever some kinds of component need, and undoes it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from ..components.groups import KINDS, find_groups
from ..surgery.undo import undone_on_error, values_undone
from .align_embeddings import align_embeddings
from .align_heads import align_heads
from .basis_name import attributes_of


# By the attribute of the config that names the basis.
ALIGNED_BY: dict[str, Callable[..., None]] = {
    "aligned_heads": align_heads,
    "aligned_embeddings": align_embeddings,
}


def align_kinds(
    model: PreTrainedModel, kinds: Sequence[str], batches: Callable[[], Iterable[Mapping[str, Any]]], **passes: Any
) -> None:
    """Changes the bases that components of some kinds belong to, in place, so that these can be left out.

    Args:
        model (`PreTrainedModel`): The model.
        kinds (`Sequence[str]`): The kinds that shall be scored.
        batches (`Callable`): Makes the batches, for each basis anew.
        passes: Arguments of [`align_heads`] and [`align_embeddings`].
    """
    for attribute in attributes_of(kinds):
        ALIGNED_BY[attribute](model, batches(), **passes)


@contextmanager
def alignment_undone(model: PreTrainedModel, kinds: Sequence[str], always: bool = False) -> Iterator[None]:
    """Puts components of some kinds back into the bases that they are in, if what follows fails or is interrupted.

    Args:
        model (`PreTrainedModel`): The model.
        kinds (`Sequence[str]`): The kinds.
        always (`bool`, *optional*, defaults to `False`): Whether to put them back in any case.
    """
    attributes = attributes_of(kinds)
    names = [name for name, kind in KINDS.items() if kind.basis in attributes]
    if not names:
        yield
        return
    projections = [projection for group in find_groups(model, names) for projection in group.projections]
    parameters = dict.fromkeys(parameter for projection in projections for parameter in projection.parameters)
    with values_undone(parameters, always), undone_on_error(model, always):
        yield
