"""The names of the bases that a model's dimensions are in."""

import hashlib
from collections.abc import Iterable

import torch
from transformers import PretrainedConfig

from ..components.groups import KINDS


# Bases need fewer examples than scores.
ALIGNED_ON = 256


def attributes_of(kinds: Iterable[str]) -> list[str]:
    """The attributes of a config that name the bases of some kinds."""
    return list(dict.fromkeys(basis for name in kinds if name in KINDS and (basis := KINDS[name].basis)))


def depends_on_basis(kinds: Iterable[str]) -> bool:
    """Whether components of some of the kinds are dimensions, which are others in another basis."""
    return bool(attributes_of(kinds))


def basis_of(config: PretrainedConfig, kinds: Iterable[str] = KINDS) -> str:
    """The names of the bases that components of some kinds belong to; `""` where nothing of these was aligned."""
    return " ".join(name for attribute in attributes_of(kinds) if (name := getattr(config, attribute, None)))


def name_basis(config: PretrainedConfig, kind: str, name: str) -> None:
    """Notes that the components of a kind, and of those that share its basis, are in another one from now on."""
    for attribute in attributes_of([kind]):
        setattr(config, attribute, name)


def digest(sums: torch.Tensor) -> str:
    """A short name of what a basis was computed from."""
    return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()[:16]


def take_bases(config: PretrainedConfig, other: PretrainedConfig) -> None:
    """Notes that all components are in the bases that another config names."""
    for attribute in attributes_of(KINDS):
        vars(config).pop(attribute, None)
        if name := getattr(other, attribute, None):
            setattr(config, attribute, name)
