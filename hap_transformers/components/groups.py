"""Groups of interchangeable components, and the kinds of component that there are.

A component is what can be removed: an attention head, an FFN neuron. All kinds share one shape, the [`Group`]; a
[`Kind`] says what differs. To add a kind, write one file like `neurons.py` that ends with `register_kind(...)`, and
give its names to the entries of `ARCHITECTURES`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import Architecture, get_architecture, tower_path
from .architectures import layer_paths as layer_paths
from .forwards import eager_model
from .projections import Projection
from .record import recorded_structure


@dataclass
class Group:
    """Components of one layer that can be removed one by one.

    A component owns one of `num_components` equal runs of rows (and biases) in every writer and follower, and such a
    run of columns in every reader. A reader's bias belongs to no component.

    Args:
        kind (`Kind`): What the components are.
        layer (`int`): Number of the layer.
        writers (`list[Projection]`): Projections whose output rows the components own.
        followers (`list[Projection]`): Projections that shrink with the writers, but are not scored.
        readers (`list[Projection]`): Projections whose input columns the components own.
        kept (`Sequence[int]`): Numbers of the components that are left.
        original (`int`): Components are numbered from 0 to `original - 1`.
        core (`nn.Module`, *optional*): The module between writers and readers, such as attention or activation.
        names (`Any`, *optional*): The architecture's names for this kind.
        runs (`Runs`, *optional*): For components that are parts of others, as dimensions are of heads, how these hold
            them.
        head_size (`int`, *optional*): Of attention heads, their dimensions in the dense model.
        shared (`int`, *optional*, defaults to 1): Of attention heads, how many query heads read each of them.
        around (`nn.Module`, *optional*): Of attention heads and their dimensions, the layer, from which names lead.
        masked (`list[Projection]`, *optional*): Of components that nothing reads, the writers and followers whose
            outputs a mask multiplies: one factor of every product that the components are in.
        of_stream (`list[Projection]`, *optional*): The writers that read the residual stream alone; by default all.
        block (`int`, *optional*): Number of the residual block, where it is not that of the layer.
        plain (`str`, *optional*): Attribute of the config with the number of components in the dense model, if it has
            one for all groups with that attribute.
        decoded (`bool`, *optional*, defaults to `False`): Whether the block lies in the decoder of an encoder-decoder.
        shortcut (`nn.Module`, *optional*): What gives the residual stream that is added to, if not the block's input.
        alone (`bool`, *optional*, defaults to `False`): Whether the reader's output is added to nothing.
        norm (`RunningNorm`, *optional*): The norm with running statistics of what the reader gives.
        scale (`torch.Tensor`, *optional*): What multiplies the reader's output before it is added, shape `(outputs,)`.
        windowed (`bool`, *optional*, defaults to `False`): Whether projections see the tokens of an image in windows.
        read_by (`nn.Module`, *optional*): The norm that reads the residual stream before the block, if what the block
            before adds to it is not just what its reader gives.
        whole (`int`, *optional*): For components that are worth a reader only if some of them go: their number in the
            dense model, whose modules have no reader. It then has as many outputs.
        implantable (`nn.Module`, *optional*): The module that an implant changes, if one can be put in.
        implant_saves (`float`, *optional*, defaults to 0.0): Share of a component's weights in the writer that a rank
            of an implant does without.
        members (`list[Group]`, *optional*): Of a component that is made of others, the groups that it is made of.
    """

    kind: "Kind"
    layer: int
    writers: list[Projection]
    followers: list[Projection]
    readers: list[Projection]
    kept: Sequence[int]
    original: int
    core: nn.Module | None = None
    names: Any = None
    runs: Any = None
    head_size: int = 0
    shared: int = 1
    around: nn.Module | None = None
    masked: list[Projection] = field(default_factory=list)
    of_stream: list[Projection] | None = None
    block: int = -1
    plain: str = ""
    decoded: bool = False
    shortcut: nn.Module | None = None
    alone: bool = False
    norm: Any = None
    scale: torch.Tensor | None = None
    windowed: bool = False
    read_by: nn.Module | None = None
    whole: int | None = None
    implantable: nn.Module | None = None
    implant_saves: float = 0.0
    members: list["Group"] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.block < 0:
            self.block = self.layer

    @property
    def num_components(self) -> int:
        """Number of components that are left."""
        return len(self.kept)

    @property
    def reader(self) -> Projection:
        """The one reader."""
        (reader,) = self.readers
        return reader

    @property
    def projections(self) -> list[Projection]:
        """All projections that shrink with the group, readers last."""
        return [*self.writers, *self.followers, *self.readers]

    @property
    def implant_rank(self) -> int:
        """Number of components at the end of the group that are an implant."""
        return 0 if self.implantable is None else vars(self.implantable).get("implant_rank", 0)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters that hold scored weights, each once."""
        written = [parameter for projection in self.writers for parameter in projection.parameters]
        return list(dict.fromkeys([*written, *(reader.module.weight for reader in self.readers)]))

    def sum_over_components(self, tensors: Mapping[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Sums tensors shaped like `parameters` into one number per component, shape `(num_components,)`."""
        runs = [reader.matrix(tensors[reader.module.weight]).T for reader in self.readers]
        for projection in self.writers:
            runs.append(projection.matrix(tensors[projection.module.weight]))
            if projection.has_bias:
                runs.append(projection.outputs_of(tensors[projection.module.bias]))
        return torch.stack([rows.reshape(self.num_components, -1).sum(1) for rows in runs]).sum(0)

    def weights_per_component(self) -> int:
        """Number of scored weights that one component owns (p_c); 0 where no component is left."""
        rows = sum(projection.weights_by_rows() for projection in self.writers)
        columns = sum(reader.module.weight.numel() for reader in self.readers)
        return (rows + columns) // max(self.num_components, 1)

    def parameters_per_component(self) -> int:
        """Number of parameters that go with one component, scored or not; 0 where no component is left."""
        unscored = sum(projection.weights_by_rows() for projection in self.followers)
        return self.weights_per_component() + unscored // max(self.num_components, 1)

    def parameters_with(self, count: int) -> int:
        """Number of parameters that go with so many components together."""
        if self.whole is None:
            return count * self.parameters_per_component()
        written = sum(projection.weights_by_rows() for projection in self.writers) // max(self.num_components, 1)
        return count * (written + (self.whole if count < self.whole else 0))

    @property
    def is_split(self) -> bool:
        """Whether it has a reader that its dense modules have not."""
        return self.whole is not None and bool(self.readers)


def empty_parameters(group: Group) -> set[torch.Tensor]:
    """Parameters of a group's projections without elements."""
    return {p for projection in group.projections for p in projection.parameters if p.numel() == 0}


@dataclass(frozen=True)
class Kind:
    """What differs between kinds of component.

    Args:
        name (`str`): Name in scores, plans and configs, such as `"heads"`.
        singular (`str`): The same for one component, such as `"head"`.
        label (`str`): Words for tables and cards, such as `"attention heads"`.
        find (`Callable`): Takes a model and its [`Architecture`], returns the model's groups, first layer first.
        fit (`Callable`): Makes the modules of a group work with the components that its projections hold. It is called
            after every change of their number.
        floor (`float`): What every group keeps at least, for scores that do not foresee a refit.
        floor_is_share (`bool`): Whether floors are shares of the dense model's components, or numbers of components.
        step (`int`, *optional*, defaults to 1): Groups that lose components keep a multiple of this.
        keeps_numbers (`bool`, *optional*, defaults to `False`): Whether components keep the numbers of the dense model
            (`config.pruned_NAME` then records which are gone), or are numbered anew after each removal.
        implant (`Callable`, *optional*): Takes a group and a rank, makes as many of the last components of the group
            an implant. `None` where implants cannot replace removed components.
        linear_implants (`bool`, *optional*, defaults to `True`): Whether an implant is a low-rank linear map, of
            fewer ranks than it replaces components. Otherwise each rank is a cheaper form of one component, which
            keeps its number.
        implant_label (`str`, *optional*): Words for components of an implant, for cards.
        implant_needs (`str`, *optional*): What a group must have to get an implant, for errors.
        instead_of (`str`, *optional*): The kind that this one is a finer view of. A model's groups are of that kind,
            until it has lost components of a finer view or is asked for them. It uses that kind's names.
        needs (`str`, *optional*): For components that are parts of others: the kind without which those of the same
            part are of no use, as query/key dimensions are without value dimensions of their head.
        write_plain (`Callable`, *optional*): Takes a config, a group and a number, and writes that number into the
            config as a dense model's, of all layers. `None` where no number of a config says it.
        idle (`Callable`, *optional*): Takes a group without components, returns the parameters that its layer no
            longer uses. By default these are the parameters without elements.
        basis (`str`, *optional*): Attribute of the config that names the basis which components are of, for those that
            are others in another basis.
        outside (`bool`, *optional*, defaults to `False`): Whether they lie outside the layers. A model's groups are of
            that kind only where it has lost components of it, or is asked for them.
        split (`Callable`, *optional*): Takes a dense group, adds the reader that it needs to lose components.
        join (`Callable`, *optional*): Takes a split group, and undoes that.
        refuses (`Callable`, *optional*): Takes a model and its [`Architecture`], returns why components of this kind
            cannot go, or `None` if they can.
        made_of (`tuple[str, ...]`, *optional*): The kinds of which a component of this one has all that a layer has.
            It is scored and chosen; surgery and checkpoints know what it is made of. A model has such components if
            its entry in `ARCHITECTURES` names all these kinds.
    """

    name: str
    singular: str
    label: str
    find: Callable[[PreTrainedModel, Architecture], list[Group]]
    fit: Callable[[Group], None]
    floor: float
    floor_is_share: bool
    step: int = 1
    keeps_numbers: bool = False
    implant: Callable[[Group, int], None] | None = None
    linear_implants: bool = True
    implant_label: str = "linear, as low-rank implants"
    implant_needs: str = "an activation that the model's entry in hap_transformers.ARCHITECTURES names"
    instead_of: str | None = None
    needs: str | None = None
    write_plain: Callable[[PretrainedConfig, Group, int], None] | None = None
    idle: Callable[[Group], set[torch.Tensor]] = empty_parameters
    basis: str | None = None
    outside: bool = False
    split: Callable[[Group], None] | None = None
    join: Callable[[Group], None] | None = None
    refuses: Callable[[PreTrainedModel, Architecture], str | None] | None = None
    made_of: tuple[str, ...] = ()

    def is_named(self, names: Collection[str]) -> bool:
        """Whether an architecture that has names for some kinds has components of this one."""
        return set(self.made_of or (self.instead_of or self.name,)) <= set(names)


# In the order in which a layer runs them.
KINDS: dict[str, Kind] = {}


def register_kind(kind: Kind) -> None:
    """Makes a kind of component known to scoring, planning, surgery, checkpoints, cards and the command line.

    A model has components of the kinds that its entry in `ARCHITECTURES` has names for. Kinds are registered in the
    order in which a layer runs them.

    Raises:
        ValueError: If there is a kind of that name.
    """
    if kind.name in KINDS:
        raise ValueError(f"There is a kind '{kind.name}' already; give yours another name.")
    KINDS[kind.name] = kind


def find_groups(model: PreTrainedModel, kinds: Iterable[str] | None = None) -> list[Group]:
    """Lists a model's groups, kind by kind, first layer first.

    The layers of a decoder are numbered after the encoder's. Its cross-attention has numbers of its own behind them:
    with E layers in the encoder and D in the decoder, heads of the encoder's self-attention are those of the layers
    from 0, of the decoder's from E, and of cross-attention from E + D.

    What is left of a pruned layer is read from its weights and the config, so fresh, pruned and reloaded models are
    all seen as they are.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture.
        kinds (`Iterable[str]`, *optional*): Names of the kinds to look for; by default all.

    Raises:
        ValueError: If the architecture is unknown, or its entry or the config does not fit the model.
    """
    model = eager_model(model)
    architecture = get_architecture(model)
    _validate_is_eager(model, architecture)
    wanted = kinds_in_use(model) if kinds is None else set(kinds)
    found = [kind for name, kind in KINDS.items() if name in wanted and kind.is_named(architecture.names)]
    return [group for kind in found for group in kind.find(model, architecture)]


def kinds_in_use(model: PreTrainedModel, named: Iterable[str] = ()) -> list[str]:
    """The kinds that a model's groups are of: those that are no other view of a kind, but for what it has lost.

    Args:
        model (`PreTrainedModel`): The model.
        named (`Iterable[str]`, *optional*): Kinds that are asked for.
    """
    recorded = recorded_structure(model.config) or {}
    used = {*(name for name, layers in recorded.items() if layers), *named}
    replaced = {kind.instead_of for kind in KINDS.values() if kind.name in used} - {None}
    present = get_architecture(eager_model(model)).names
    return [
        name
        for name, kind in KINDS.items()
        if kind.is_named(present)
        and not kind.made_of
        and (name in used or not kind.outside)
        and (kind.instead_of in replaced if kind.instead_of else name not in replaced)
    ]


def lost_parts(model: PreTrainedModel) -> set[str]:
    """Kinds of which a model has lost parts, so that the finer views are the only ones."""
    recorded = (KINDS[name] for name in recorded_structure(model.config) or {} if name in KINDS)
    return {kind.instead_of for kind in recorded if kind.instead_of}


def validate_undivided(model: PreTrainedModel, kinds: Iterable[str]) -> None:
    """Checks that components of some kinds can still go whole.

    Raises:
        ValueError: If they have lost dimensions.
    """
    if lost := [kind for kind in kinds if kind in lost_parts(model)]:
        parts = " and ".join(kind.name for kind in KINDS.values() if kind.instead_of in lost)
        raise ValueError(
            f"The {lost[0]} of this {type(model).__name__} have lost dimensions and no longer go whole. Name {parts} "
            f"in place of {lost[0]}."
        )


def by_kind(groups: Iterable[Group]) -> dict[Kind, list[Group]]:
    """Sorts groups by their kind, in the order in which kinds appear."""
    found: dict[Kind, list[Group]] = {}
    for group in groups:
        found.setdefault(group.kind, []).append(group)
    return found


def of_kind(groups: Iterable[Group], name: str) -> list[Group]:
    """The groups of one kind."""
    return [group for group in groups if group.kind.name == name]


def in_forward_order(groups: Iterable[Group]) -> list[Group]:
    """The groups in the order in which a model runs them: block by block, kinds as they are registered."""
    places = {name: place for place, name in enumerate(KINDS)}
    return sorted(groups, key=lambda group: (group.block, places[group.kind.name], group.layer))


def emptied_modules(model: PreTrainedModel) -> list[str]:
    """Names of the projections that pruning has left without any weight.

    Some adapters cannot be put on a module of size zero. PEFT leaves these out by
    `LoraConfig(..., exclude_modules=emptied_modules(model))`.

    Args:
        model (`PreTrainedModel`): A model of a supported architecture, pruned or not.
    """
    empty = {p.module for group in find_groups(model) for p in group.projections if p.module.weight.numel() == 0}
    return [name for name, module in model.named_modules() if module in empty]


def freeze_idle_parameters(groups: Iterable[Group]) -> None:
    """Lets parameters that layers without components, or with an implant alone, do not use require no gradients.

    DistributedDataParallel would wait for their gradients.
    """
    for group in groups:
        if group.num_components == group.implant_rank:
            for parameter in group.kind.idle(group):
                parameter.requires_grad_(False)


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """A model's layers, first layer first; those of a decoder come after the encoder's.

    Raises:
        ValueError: If the architecture is unknown.
    """
    model = eager_model(model)
    paths = layer_paths(model, get_architecture(model))
    return [model.base_model.get_submodule(path.removesuffix(".")) for path in paths]


def _validate_is_eager(model: PreTrainedModel, architecture: Architecture) -> None:
    lists = [tower_path(model, architecture) + architecture.layers.split(".*.")[0]]
    lists += [architecture.decoder.layers] if architecture.decoder else []
    for path, module in model.base_model.named_modules():
        if eager_model(module) is not module and any(ls.startswith(path) or path.startswith(ls) for ls in lists):
            raise ValueError(
                f"Cannot score or prune {type(model).__name__}: its module '{path or model.base_model_prefix}' is "
                "wrapped by torch.compile, which hides the modules inside. Compile modules in place "
                "(`module.compile()`), which can be pruned, or put back the one inside (`module._orig_mod`)."
            )
