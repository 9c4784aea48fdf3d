"""`PruningPlan`: what to remove from a model, as data."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..alignment.basis_name import attributes_of, basis_of
from ..components.groups import KINDS, Group, by_kind, find_groups, kinds_in_use
from ..components.plain_config import validate_plain
from ..efficiency import count_parameters
from ..files import read_json, write_text
from .component_numbers import Removed, plain_implant, plain_layers, plain_removals, validate_numbers
from .plan_costs import parameters_removed


@dataclass(repr=False)
class PruningPlan:
    """What to remove from a model. A plan is data: save it, read it, edit it by hand.

    Args:
        removed (`dict[str, dict[int, list[int]]]`): For each kind of component (`"heads"`, `"neurons"`), layer number
            to the numbers of the components to remove there. Heads are numbered as in the dense model, neurons as in
            the model the plan was made for, pruned before or not. Whole numbers of any type are accepted.
        model_type (`str`): The `config.model_type` the plan was made for.
        original (`dict[str, list[int]]`): For each kind, how many components each layer's numbers count. A kind that
            the plan removes must be there.
        implants (`dict[int, int | list[int]]`, *optional*): Layer number to the rank of the linear map that takes the
            place of removed neurons there. A rank costs what a neuron costs. Or layer number to the numbers of
            removed channels that stay with a 1x1 filter.
        budget (`str`, *optional*): What `ratio` is a share of.
        ratio (`float`, *optional*): The share that was asked for.
        method (`str`, *optional*): The scoring method behind the plan.
        promise (`dict[str, float]`, *optional*): What the whole model will cost afterwards: `"parameters"`, and if
            they were asked for `"flops"` and `"latency"` (seconds) of a forward pass. Delete it from a plan that you
            edit.
        basis (`str`, *optional*): For plans that remove dimensions: the names of the bases that these are of
            (`config.aligned_heads`, `config.aligned_embeddings`), `""` for what was not aligned.
        saved (`dict[str, int]`, *optional*): For each kind, the parameters that its removals take from the model, less
            those of implants. Weights that belong to two components count for both.
        uniform (`bool`, *optional*, defaults to `False`): Whether all layers keep as many components of a kind, and
            the pruned model is saved with plain numbers in its config, as a dense model of that size is.
    """

    removed: dict[str, Removed]
    model_type: str
    original: dict[str, list[int]] = field(default_factory=dict)
    implants: dict[int, int | list[int]] = field(default_factory=dict)
    budget: str = ""
    ratio: float | None = None
    method: str = ""
    promise: dict[str, float] = field(default_factory=dict)
    basis: str = ""
    saved: dict[str, int] = field(default_factory=dict, compare=False)  # What is removed says it.
    uniform: bool = False

    def __post_init__(self):
        self.removed = {kind: plain_removals(layers) for kind, layers in self.removed.items()}
        self.implants = plain_layers(self.implants, lambda _, found: plain_implant(found))

    def __repr__(self) -> str:
        """What goes in numbers; the components themselves are thousands."""
        gone = (
            f"{self.count(kind):,} of {sum(self.original.get(kind, ())):,} {kind}"
            + (f" ({self.saved[kind]:,} parameters)" if kind in self.saved else "")
            for kind, layers in self.removed.items()
            if layers
        )
        settings = {name: getattr(self, name) for name in ("model_type", "budget", "ratio", "method")}
        shown = [f"{name}={value!r}" for name, value in settings.items() if value not in ("", None)]
        shown += [f"implants={self.implants}"] if self.implants else []
        return f"PruningPlan(removes {', '.join(gone) or 'nothing'}; {', '.join(shown)})"

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        *,
        implants: Mapping[int, int | Sequence[int]] | None = None,
        budget: str = "",
        ratio: float | None = None,
        method: str = "",
        promise: Mapping[str, float] | None = None,
        basis: str | None = None,
        uniform: bool = False,
        **removed: Mapping[int, Sequence[int]] | None,
    ) -> "PruningPlan":
        """A plan for a model as it is now, such as `PruningPlan.for_model(model, heads={0: [1]}, neurons={3: [7]})`.

        Args:
            model (`PreTrainedModel`): The model; it is only read.
            implants (`Mapping[int, int | Sequence[int]]`, *optional*): Layer number to the rank to put in there, or to
                the numbers of removed channels to keep with a 1x1 filter.
            budget, ratio, method, promise: For the record.
            basis (`str`, *optional*): The basis that dimensions of heads are of; by default the model's.
            uniform (`bool`, *optional*): Whether all layers keep as many.
            removed: For each kind of component, layer number to what to remove there.

        Raises:
            ValueError: As `validate` does.
            TypeError: If there is no such kind, or something else than whole numbers is given for a layer.
        """
        unknown = removed.keys() - KINDS.keys()
        if unknown:
            raise TypeError(f"There is no kind of component {sorted(unknown)}; the kinds are {', '.join(KINDS)}.")
        groups = find_groups(model, kinds_in_use(model, _named(removed)))
        found = by_kind(groups)
        given: dict[str, Any] = {kind.name: {} for kind in found}
        given.update((kind, dict(layers)) for kind, layers in removed.items() if layers)
        plan = cls(
            removed=given,
            model_type=model.config.model_type,
            original={kind.name: [group.original for group in members] for kind, members in found.items()},
            implants=dict(implants or {}),  # type: ignore[arg-type]
            budget=budget,
            ratio=ratio,
            method=method,
            promise=dict(promise or {}),
            basis=basis_of(model.config, _named(given)) if basis is None else basis,
            uniform=uniform,
        )
        plan.validate(model, groups)
        return plan

    @property
    def heads(self) -> Removed:
        """Layer number to the heads to remove there."""
        return self.removed.get("heads", {})

    @property
    def neurons(self) -> Removed:
        """Layer number to the FFN neurons to remove there."""
        return self.removed.get("neurons", {})

    def count(self, kind: str) -> int:
        """Number of components of a kind that the plan removes."""
        return sum(len(numbers) for numbers in self.removed.get(kind, {}).values())

    def of_group(self, group: Group) -> list[int]:
        """Numbers of the components that the plan removes from a group."""
        return self.removed.get(group.kind.name, {}).get(group.layer, [])

    def groups_of(self, model: PreTrainedModel) -> list[Group]:
        """All groups of a model, of the kinds that the plan names where a kind is another's finer view."""
        return find_groups(model, kinds_in_use(model, _named(self.removed)))

    def rank_for(self, group: Group) -> int:
        """Rank of the implant that the plan puts into a group, 0 for none."""
        return self.ranks.get(group.layer, 0) if group.kind.implant is not None else 0

    def implanted_in(self, group: Group) -> list[int]:
        """Numbers of the components of the implant that the plan puts into a group, where these keep them."""
        found = self.implants.get(group.layer)
        return found if isinstance(found, list) and group.kind.implant is not None else []

    @property
    def ranks(self) -> dict[int, int]:
        """Layer number to the rank of the implant that the plan puts in there."""
        return {layer: len(found) if isinstance(found, list) else found for layer, found in self.implants.items()}

    def left_in(self, group: Group) -> int:
        """Number of components that a group has afterwards, an implant's rank among them."""
        return len(set(group.kept) - set(self.of_group(group))) + self.rank_for(group)

    def count_parameters(self, model: PreTrainedModel) -> int:
        """Number of parameters that the plan takes from a model, less those of implants.

        Heads already gone count for nothing.

        Raises:
            ValueError: As `validate` does.
        """
        groups = self.groups_of(model)
        self.validate(model, groups)
        return parameters_removed(groups, *self.sizes_of(groups))

    def validate(self, model: PreTrainedModel, groups: Sequence[Group] | None = None) -> None:
        """Checks that the plan fits a model as it is now.

        Args:
            model (`PreTrainedModel`): The model.
            groups (`Sequence[Group]`, *optional*): All its groups, if they are at hand.

        Raises:
            ValueError: If the plan was made for another model type or shape, names a layer or component that does not
                exist, or one twice, removes dimensions of another basis, implants more than it removes, promises
                another number of parameters, or is uniform but leaves layers of different sizes.
        """
        groups = self.groups_of(model) if groups is None else groups
        found = {kind.name: members for kind, members in by_kind(groups).items()}
        self._validate_shape(model, found)
        validate_basis(self.basis, model, _named(self.removed))
        for kind, layers in ((kind, layers) for kind, layers in self.removed.items() if layers):
            for layer, numbers in layers.items():
                if len(set(numbers)) != len(numbers):
                    named = f"a {KINDS[kind].singular} of layer {layer}"
                    raise ValueError(f"The plan names {named} twice: {sorted(numbers)}.")
            validate_numbers(found[kind], layers)
        for layer, found_there in self.implants.items():
            self._validate_implant(layer, found_there, [g for g in groups if g.layer == layer and g.kind.implant])
        self._validate_needed(groups)
        if self.uniform:
            validate_plain(model, groups, [self.left_in(group) for group in groups])
        parameters = count_parameters(model) - parameters_removed(groups, *self.sizes_of(groups))
        if parameters != self.promise.get("parameters", parameters):
            raise ValueError(
                f"The plan promises {self.promise['parameters']} parameters, but {type(model).__name__} would have "
                f"{parameters}. If you edited the plan, delete its promise; otherwise make a plan for this model."
            )

    def _validate_implant(self, layer: int, implant: int | list[int], groups: Sequence[Group]) -> None:
        gone = {number for group in groups for number in self.of_group(group)}
        if any(group.kind.keeps_numbers for group in groups) or isinstance(implant, list):
            if not isinstance(implant, list) or not implant or not gone.issuperset(implant):
                raise ValueError(
                    f"The plan implants {implant} in layer {layer}, where it removes {sorted(gone)}. Name some of the "
                    "channels that it removes, which then keep a 1x1 filter. Nothing was pruned."
                )
        elif not 0 < implant <= len(gone):
            raise ValueError(
                f"The plan implants rank {implant} in layer {layer}, where it removes {len(gone)} components that an "
                "implant can replace. A rank costs what such a component costs, so it must be from 1 to that number. "
                "Nothing was pruned."
            )

    def _validate_shape(self, model: PreTrainedModel, found: Mapping[str, Sequence[Group]]) -> None:
        if self.model_type != model.config.model_type:
            raise ValueError(
                f"The plan is for a '{self.model_type}', but {type(model).__name__} is a '{model.config.model_type}'. "
                "Make a plan for this model."
            )
        unknown = [kind for kind, layers in self.removed.items() if layers and kind not in found]
        if unknown:
            wholes = (KINDS[kind].made_of for kind in unknown if kind in KINDS)
            parts = [" and ".join(made_of) for made_of in wholes if made_of]
            raise ValueError(
                f"The plan removes {', '.join(unknown)}, but {type(model).__name__} has components of the kinds "
                f"{', '.join(found)} only.{f' To remove a layer, name all its {parts[0]}.' if parts else ''}"
            )
        for kind, groups in found.items():
            shape = [group.original for group in groups]
            # Plans of an encoder alone were made before decoders had components.
            known = (shape, [group.original for group in groups if not group.decoded])
            implanted = groups[0].kind.implant is not None and self.implants
            named = groups[0].kind.keeps_numbers or self.removed.get(kind) or implanted
            if named and self.original.get(kind) not in known:
                raise ValueError(
                    f"The plan is for {self.original.get(kind)} {kind} per layer, but {type(model).__name__} has "
                    f"{shape}. Make a plan for this model as it is now."
                )

    def _validate_needed(self, groups: Sequence[Group]) -> None:
        """Checks that nothing stays that is of no use without what goes."""
        parts = {(group.kind.name, group.layer): self.left_of_parts(group) for group in groups if group.runs}
        for group in groups:
            if group.runs is None or group.kind.needs is None:
                continue
            needed = parts[group.kind.needs, group.layer]
            useless = [
                place for place, left in enumerate(parts[group.kind.name, group.layer]) if left > 0 == needed[place]
            ]
            if useless:
                raise ValueError(
                    f"The plan leaves {group.kind.instead_of} {useless} of layer {group.layer} {group.kind.name}, but "
                    f"no {group.kind.needs}, without which they are of no use. Remove them, too. Nothing was pruned."
                )

    def sizes_of(self, groups: Sequence[Group]) -> tuple[list[int], list[int]]:
        """What every group keeps afterwards, and how much of it is an implant."""
        return [self.left_in(group) for group in groups], [self.rank_for(group) for group in groups]

    def left_of_parts(self, group: Group) -> list[int]:
        """Components that every part of a group has afterwards."""
        assert group.runs is not None
        gone, left = set(self.of_group(group)), len(group.runs.left) * [0]
        for number, part in enumerate(group.runs.of_each()):
            left[part] += number not in gone
        return left

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, the components of a layer on one line."""
        text = json.dumps(asdict(self), indent=2)
        text = re.sub(r"\[[\d\s,]*\]", lambda numbers: " ".join(numbers[0].split()), text)
        write_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a plan.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No pruning plan at '{path}'; `hap plan` or `PruningPlan.save` writes one.")
        try:
            plan = cls(**_by_kind(read_json(path)))
            if not isinstance(plan.promise, dict):
                raise TypeError("promise must be a dict")
            for name in ("model_type", "budget", "method", "basis"):
                if not isinstance(getattr(plan, name), str):
                    raise TypeError(f"{name} must be a str")
            if not isinstance(plan.uniform, bool):
                raise TypeError("uniform must be a bool")
            for name, counts in plan.original.items():
                if not isinstance(counts, list) or any(type(count) is not int for count in counts):
                    raise TypeError(f"original {name} must be a list of whole numbers")
            return plan
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"'{path}' is not a pruning plan: {error!r}") from error


def validate_basis(basis: str, model: PreTrainedModel, kinds: Iterable[str]) -> None:
    """Checks that components of some kinds, of which dimensions depend on a basis, are those of a model as it is.

    Raises:
        ValueError: If they are of another basis.
    """
    attributes, present = attributes_of(kinds := list(kinds)), basis_of(model.config, kinds)
    if attributes and basis != present:
        what = " and ".join(attribute.removeprefix("aligned_") for attribute in attributes)
        functions = " and ".join(f"align_{attribute.removeprefix('aligned_')}" for attribute in attributes)
        raise ValueError(
            f"The plan removes dimensions of {what} in {_basis(basis)}, but the {what} of this {type(model).__name__} "
            f"are in {_basis(present)}, whose dimensions are others. Make a plan by scores of the model as it is now, "
            f"or align its {what} again ({functions}), score it and plan. Nothing was pruned."
        )


def _basis(name: str) -> str:
    return f"the basis '{name}'" if name else "the basis that they were trained in"


def _named(removed: Mapping[str, Any]) -> list[str]:
    """The kinds of which something is removed."""
    return [kind for kind, layers in removed.items() if layers]


def _by_kind(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved plan; the first release wrote heads and neurons under names of their own."""
    if "removed" in values:
        return values
    removed = {"heads": values.pop("heads"), "neurons": values.pop("neurons", {})}
    original = {"heads": values.pop("original_heads"), "neurons": values.pop("num_neurons", [])}
    return {"removed": removed, "original": original, **values}
