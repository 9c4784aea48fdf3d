"""`Method`: what a scoring method is, and the registry of methods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..components.groups import Group
from .batches import ScoredBatch
from .statistics import SampleMoments
from .task import Samples, ScoringTask


SampleFunction = Callable[[ScoringTask, ScoredBatch], Samples]


@dataclass
class Finished:
    """Final scores.

    Args:
        scores (`torch.Tensor`): A score per component, shape `(num_components,)`.
        order (`torch.Tensor`, *optional*): Each component's place, from 0, in its group's order of removal, int64.
        interactions (`torch.Tensor`, *optional*): A matrix over the components of the first kind that was scored.
    """

    scores: torch.Tensor
    order: torch.Tensor | None = None
    interactions: torch.Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A scoring method, and the facts about it that others rely on.

    Args:
        sample (`Callable`, *optional*): Takes a `ScoringTask` and a batch, returns `Samples`. `None` for a method
            that needs no data.
        finish (`Callable`): Takes the task and the mean of all samples, shape `(num_components,)` (`None` without
            data), returns the scores, of the same shape. It also turns the means of either half of the samples into
            the rankings whose correlation is the reliability.
        settle (`Callable`, *optional*): Takes the task, all `SampleMoments` and whether to show a progress bar,
            returns `Finished` scores. For methods whose final scores need more than means.
        num_sums (`Callable`, *optional*): Takes the task, returns how many numbers `Samples.sums` has.
        by_layer (`bool`, *optional*, defaults to `False`): Whether sums and scores of one layer do not depend on other
            layers, so that layers can be scored one after the other where memory is short.
        curvature (`str`, *optional*): What the method needs second derivatives of the loss in: `"logits"`, which needs
            a loss that is computed from one call's outputs, or `"weights"`. By default it needs none.
        kinds (`tuple[str, ...]`, *optional*): The kinds of component it can score. By default all.
        except_kinds (`tuple[str, ...]`, *optional*): The kinds that it cannot score. Methods that mask what components
            are read of cannot score query/key dimensions, which no projection reads.
        comparable (`bool`, *optional*, defaults to `False`): Whether scores of different kinds compare. Otherwise
            planning ranks each kind by itself, and the same share of each goes.
        foresees_refit (`bool`, *optional*, defaults to `False`): Whether scores account for a refit of what is left.
            Planning then needs no floors.
        in_loss_units (`bool`, *optional*, defaults to `False`): Whether scores are changes of the loss.
        has_traces (`bool`, *optional*, defaults to `False`): Whether the samples' means are traces, to be reported
            with standard errors.
        per_example (`bool`, *optional*, defaults to `True`): Whether a sample is an example, or a probe on a batch.
        scores_sharded (`bool`, *optional*, defaults to `True`): Whether it can score models with sharded weights
            (FSDP).
        of_wholes (`Method`, *optional*): What scores components that are made of others, such as whole layers, in its
            place. By default it scores them itself.
    """

    sample: SampleFunction | None
    finish: Callable[[ScoringTask, torch.Tensor | None], torch.Tensor]
    settle: Callable[[ScoringTask, SampleMoments, bool], Finished] | None = None
    num_sums: Callable[[ScoringTask], int] | None = None
    by_layer: bool = False
    curvature: str | None = None
    kinds: tuple[str, ...] | None = None
    except_kinds: tuple[str, ...] = ()
    comparable: bool = False
    foresees_refit: bool = False
    in_loss_units: bool = False
    has_traces: bool = False
    per_example: bool = True
    scores_sharded: bool = True
    of_wholes: "Method | None" = None

    def can_score(self, kind: str) -> bool:
        """Whether it can score a kind of component."""
        return kind not in self.except_kinds and (self.kinds is None or kind in self.kinds)

    def for_groups(self, groups: Sequence[Group]) -> "Method":
        """The method that scores some groups: itself, or that for components that are made of others."""
        return self.of_wholes or self if any(group.members for group in groups) else self


METHODS: dict[str, Method] = {}


def register_method(name: str, method: Method) -> None:
    """Makes a scoring method known to `estimate_sensitivity`, `HapConfig` and the `hap` command.

    Args:
        name (`str`): What users call it.
        method (`Method`): The method.

    Raises:
        ValueError: If there is a method of that name.

    Example:
        >>> def widest(task, means):
        ...     return task.squared_norms.sqrt()
        >>> register_method("widest", Method(sample=None, finish=widest))
        >>> METHODS.pop("widest").comparable
        False
    """
    if name in METHODS:
        raise ValueError(f"There is a scoring method '{name}' already; give yours another name.")
    METHODS[name] = method


def get_method(name: str) -> Method:
    """Looks up a scoring method.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in METHODS:
        raise ValueError(f"Unknown sensitivity method '{name}'; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def methods_without(*curvatures: str | None) -> str:
    """Names of the methods that need no such curvature, for messages.

    Args:
        curvatures: Values of [`Method`]'s `curvature`, such as `"logits"`.
    """
    return ", ".join(name for name, method in METHODS.items() if method.curvature not in curvatures)
