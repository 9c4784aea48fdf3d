"""Which kinds of component may go: one rule for `HapConfig`, `HapTrainer` and the `hap` command."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from ..components.architectures import get_architecture
from ..components.forwards import eager_model
from ..components.groups import KINDS, Kind, find_groups, kinds_in_use, lost_parts, validate_undivided
from ..sensitivity.methods import get_method
from .settings import PlanningSettings


# Budgets of which all dimensions of a kind save the same.
BUDGETS_OF_FINER_KINDS = ("params", "model", "flops", "latency")
# The budget that counts what lies outside the layers.
WHOLE_MODEL = "model"


def kinds_to_prune(
    components: Sequence[str] | None,
    method: str,
    settings: PlanningSettings,
    model: PreTrainedModel | None = None,
    *,
    aligned: bool = True,
) -> tuple[str, ...]:
    """The kinds of component that are scored and may go.

    A kind may be a finer view of another one: dimensions of heads in place of whole heads. By default these are the
    kinds of a model where the method scores them and foresees a refit (`"kronecker"`), attention can work with
    narrower heads (without rotary embeddings), the budget is no number of components, and nothing is set about whole
    heads (`min_heads`, `uniform`). Otherwise heads go whole, unless the model has lost dimensions of heads before.
    What lies outside the layers (dimensions of word embeddings) may go where the budget is all of the model. A budget
    that is named after a kind is for that kind alone.

    Args:
        components (`Sequence[str]`, *optional*): The kinds that are asked for.
        method (`str`): The scoring method.
        settings (`PlanningSettings`): The budget and the floors.
        model (`PreTrainedModel`, *optional*): The model. Without it, what it lacks is among the kinds, too.
        aligned (`bool`, *optional*, defaults to `True`): Whether heads are in a basis in which dimensions can be left
            out ([`align_heads`]), or will be.

    Returns:
        `tuple[str, ...]`: The kinds, in the order in which a layer runs them.

    Raises:
        ValueError: If a kind is unknown, cannot go beside another or under the budget, or cannot be scored by the
            method, or the model does not have it.
    """
    if settings.budget in KINDS:
        if components is not None and set(components) != {settings.budget}:
            raise ValueError(
                f"budget='{settings.budget}' removes {settings.budget} alone, but components={list(components)}. "
                "Leave components out, or set another budget."
            )
        components = [settings.budget]
    if components is None:
        finer = aligned and settings.budget in BUDGETS_OF_FINER_KINDS and not settings.uniform
        finer = finer and not _floors_of_replaced(settings)
        if settings.budget == "latency" and model is not None:
            finer = finer and bool(kinds_timed_narrower(eager_model(model)))
        names = _default(method, finer and _foresees_finer(method), settings.budget == WHOLE_MODEL, model)
        validate_view([KINDS[name] for name in names], settings)
        return names
    if isinstance(components, str) or not components or not set(components) <= KINDS.keys():
        raise ValueError(f"`components` must name some of {', '.join(KINDS)}, got {components!r}.")
    chosen = [kind for kind in KINDS.values() if kind.name in components]
    validate_view(chosen, settings)
    if unable := [kind.name for kind in chosen if not get_method(method).can_score(kind.name)]:
        able = ", ".join(name for name in KINDS if get_method(method).can_score(name))
        raise ValueError(f"'{method}' cannot score {', '.join(unable)}; it scores {able}.")
    if model is not None:
        _validate_has(model, chosen)
        _validate_timed(model, chosen, settings)
    return tuple(kind.name for kind in chosen)


def validate_view(kinds: Iterable[Kind], settings: PlanningSettings) -> None:
    """Checks that kinds can go together, and under a budget.

    Raises:
        ValueError: If one is a finer view of another, or of one that the budget or a floor is about.
    """
    kinds = list(kinds)
    names = [kind.name for kind in kinds]
    for kind in (kind for kind in kinds if kind.made_of):
        _validate_made_of(kind, names, settings)
    for kind in (kind for kind in kinds if kind.outside and settings.budget not in (WHOLE_MODEL, kind.name)):
        raise ValueError(
            f"budget='{settings.budget}' is about the layers, where {kind.name} save nothing. Set "
            f"budget='{WHOLE_MODEL}', or leave '{kind.name}' out of the components."
        )
    for kind in (KINDS[name] for name in names if KINDS[name].instead_of):
        whole = kind.instead_of
        assert whole is not None  # Others were left out.
        if whole in names:
            raise ValueError(
                f"{kind.label.capitalize()} are parts of {whole}: remove either, not both. Leave '{whole}' or "
                f"'{kind.name}' out of the components."
            )
        together = [name for name, other in KINDS.items() if other.instead_of == whole]
        if settings.budget == "latency" and not (settings.even_heads and set(together) <= set(names)):
            raise ValueError(
                f"budget='latency' plans for {' and '.join(together)} together, evenly over {whole}. Name both in "
                f"`components` and leave even_heads as it is, or name {whole} in their place."
            )
        if whole in _floors_of_replaced(settings):
            raise ValueError(
                f"min_{whole} is a floor of whole {whole}, but {kind.name} are to go. Leave min_{whole} out, or name "
                f"{whole} in `components`."
            )


def _validate_made_of(kind: Kind, names: Sequence[str], settings: PlanningSettings) -> None:
    """Checks that components that are made of others can go as a whole."""
    parts = " and ".join(kind.made_of)
    if others := [name for name in names if name != kind.name]:
        raise ValueError(
            f"{kind.label.capitalize()} take their {parts} with them, and go by themselves: leave '{kind.name}' or "
            f"{', '.join(map(repr, others))} out of the components. What is left can be pruned again by others."
        )
    if kept := [part for part in kind.made_of if settings.floor_of(KINDS[part])]:
        floors, it = " and ".join(f"min_{part}" for part in kept), "it" if len(kept) == 1 else "them"
        raise ValueError(
            f"{floors} would keep {' and '.join(kept)} in every layer, but {kind.label} are to go. Leave {it} out, or "
            f"name {parts} in `components`."
        )
    if settings.implant_ratio:
        raise ValueError(
            f"implant_ratio={settings.implant_ratio}, but {kind.label} go, of which no implant stays. Set "
            "implant_ratio=0."
        )


def _foresees_finer(method: str) -> bool:
    """Whether a method scores all finer kinds, and foresees what a refit of the other components gives."""
    finer = [name for name, kind in KINDS.items() if kind.instead_of]
    return get_method(method).foresees_refit and all(map(get_method(method).can_score, finer))


def _floors_of_replaced(settings: PlanningSettings) -> list[str]:
    """Kinds that have a finer view, and of which a floor is set."""
    replaced = {kind.instead_of for kind in KINDS.values()} - {None}
    return [name for name in KINDS if name in replaced and settings.floor_of(KINDS[name]) is not None]


def _default(method: str, finer: bool, outside: bool, model: PreTrainedModel | None) -> tuple[str, ...]:
    """All kinds of one view that the method scores and the model has, and may lose."""
    replaced = {kind.instead_of for kind in KINDS.values()} - {None}
    single = {name: kind for name, kind in KINDS.items() if not kind.made_of}
    finest = [name for name in single if name not in replaced]
    whole = [name for name, kind in single.items() if not kind.instead_of]
    view = finest if finer else whole
    if model is not None:
        model = eager_model(model)
        if lost_parts(model):
            view = kinds_in_use(model, [name for name, kind in KINDS.items() if kind.outside])
        elif finer and not narrowing_kinds(model):
            view = whole
        known = get_architecture(model).names
        view = [name for name in view if KINDS[name].is_named(known)]
        view = [name for name in view if why_it_stays(model, KINDS[name]) is None]
    view = [name for name in view if outside or not KINDS[name].outside]
    return tuple(name for name in view if get_method(method).can_score(name))


def why_it_stays(model: PreTrainedModel, kind: Kind) -> str | None:
    """Why a model can lose no components of a kind, if so."""
    return kind.refuses and kind.refuses(model, get_architecture(model))


def narrowing_kinds(model: PreTrainedModel) -> list[str]:
    """The finer kinds, if what is around the parts of others works with fewer of them when all parts have fewer."""
    finer = [kind.name for kind in KINDS.values() if kind.instead_of]
    narrows = [group.runs.narrows for group in find_groups(model, finer) if group.runs is not None]
    return finer if narrows and all(narrows) else []


def kinds_timed_narrower(model: PreTrainedModel) -> list[str]:
    """The finer kinds, if latency tables measure them: where all layers have alike parts and see the same tokens.

    A decoder sees other tokens than its encoder, and its cross-attention sees both.
    """
    finer = narrowing_kinds(model)
    wholes = [group.runs.whole for group in find_groups(model, finer) if group.runs is not None]
    alike = len({(whole.original, whole.head_size, whole.decoded) for whole in wholes}) == 1
    return finer if alike else []


def _validate_timed(model: PreTrainedModel, kinds: Sequence[Kind], settings: PlanningSettings) -> None:
    """Checks that latency tables know the kinds of a model that a budget of latency is to be met with."""
    finer = next((kind for kind in kinds if kind.instead_of), None)
    if settings.budget == "latency" and finer is not None and not kinds_timed_narrower(eager_model(model)):
        raise ValueError(
            f"budget='latency' needs the times of narrower {finer.instead_of}. They are measured where attention "
            f"works with these and all layers are alike, unlike in this {type(model).__name__}. Name "
            f"{finer.instead_of} in `components`, or set another budget."
        )


def _validate_has(model: PreTrainedModel, kinds: Sequence[Kind]) -> None:
    model = eager_model(model)
    validate_undivided(model, [kind.name for kind in kinds])
    names = get_architecture(model).names
    if missing := [kind.name for kind in kinds if not kind.is_named(names)]:
        raise ValueError(
            f"{type(model).__name__} has no {', '.join(missing)}; the kinds of its entry in "
            f"hap_transformers.ARCHITECTURES are {', '.join(names)}."
        )
    for kind in kinds:
        if reason := why_it_stays(model, kind):
            raise ValueError(f"The {kind.name} of this {type(model).__name__} must stay: {reason}.")
