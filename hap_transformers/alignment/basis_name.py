"""The name of the basis that a model's heads are in."""

from collections.abc import Iterable

from transformers import PretrainedConfig

from ..components.groups import KINDS


ATTRIBUTE = "aligned_heads"


def depends_on_basis(kinds: Iterable[str]) -> bool:
    """Whether components of some of the kinds are dimensions, which are others in another basis."""
    return any(KINDS[name].instead_of for name in kinds if name in KINDS)


def basis_in(config: PretrainedConfig) -> str:
    """The name of the basis that a model's heads are in; `""` if they were never aligned."""
    return getattr(config, ATTRIBUTE, None) or ""


def basis_of(config: PretrainedConfig, kinds: Iterable[str]) -> str:
    """The name of the basis that components of some kinds belong to; `""` where these are no dimensions."""
    return basis_in(config) if depends_on_basis(kinds) else ""


def name_basis(config: PretrainedConfig, name: str) -> None:
    """Notes that the heads of a model are in another basis from now on."""
    if name:
        setattr(config, ATTRIBUTE, name)
    else:
        vars(config).pop(ATTRIBUTE, None)
