"""The dense model that a refit follows, without a second copy of its weights."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ..components.forwards import eager_copy
from ..components.groups import Group
from ..components.structure import join_whole
from .written import written_into


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that has the same parameters, and so takes no memory for them.

    Surgery gives the model new, smaller parameters in the place of those it cuts; the copy keeps the old ones.
    [`reconstruct`] gives the copy its own of those that it writes into. Embeddings that were aligned alone are joined
    in the copy.

    Raises:
        ValueError: If a forward was replaced, which the copy would still run on the original.
    """
    copied = eager_copy(model, {id(parameter): parameter for parameter in model.parameters()})
    join_whole(copied)
    return copied


def own_refitted(sites: Sequence[Group], originals: Sequence[Group]) -> None:
    """Gives the dense model its own of the weights that a refit writes into, where it shares them.

    Args:
        sites (`Sequence[Group]`): The groups to refit.
        originals (`Sequence[Group]`): The same groups of the dense model.
    """
    for site, original in zip(sites, originals, strict=True):
        shared = {id(parameter) for projection in written_into(site) for parameter in projection.parameters}
        whole = original if original.runs is None else original.runs.whole
        for projection in (*whole.projections, *written_into(original)):
            _replace_shared(projection.module, shared)


def own_all(copied: PreTrainedModel, model: PreTrainedModel) -> None:
    """Gives a copy its own of all parameters that it shares with the model; tied ones stay tied."""
    shared, made = {id(parameter) for parameter in model.parameters()}, dict[int, nn.Parameter]()
    for module in copied.modules():
        _replace_shared(module, shared, made)


def _replace_shared(module: nn.Module, shared: set[int], made: dict[int, nn.Parameter] | None = None) -> None:
    made = {} if made is None else made
    for name, parameter in list(module.named_parameters(recurse=False)):
        if id(parameter) in shared:
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            module.register_parameter(name, made[id(parameter)])
