"""The cells of the study, and the order in which they are run."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

from .methods import DEFAULT, EHAP, GRADIENT, HAP, IMPLANTS, MAGNITUDE, METHODS, NOTHING, RANDOM, TAYLOR, TAYLOR_REFIT
from .networks import NETWORKS


# The most telling one first.
RATIOS = (0.7, 0.5, 0.9)
SEEDS = (0, 1, 2)
FIRST, *OTHERS = NETWORKS


class Key(NamedTuple):
    """The fields that tell one cell from another. What removes nothing has ratio 0; no refit is one on 0 images."""

    network: str
    method: str
    ratio: float
    seed: int
    refit_images: int
    recovery_epochs: float = 0.0


# Networks, methods and seeds, what tells most first: a run that is cut short has the beginning.
ORDER: list[tuple[Sequence[str], Sequence[str], Sequence[int]]] = [
    ([FIRST], [NOTHING, DEFAULT, TAYLOR, TAYLOR_REFIT, MAGNITUDE, GRADIENT], [0]),
    ([FIRST], [HAP, EHAP, RANDOM, IMPLANTS], [0]),
    *(([network], [NOTHING, DEFAULT, TAYLOR, TAYLOR_REFIT, MAGNITUDE], [0]) for network in OTHERS),
    *(([network], [DEFAULT], [1, 2]) for network in NETWORKS),
    *(([network], [GRADIENT, HAP, EHAP, RANDOM, IMPLANTS], [0]) for network in OTHERS),
    *(([network], [name for name in METHODS if name != DEFAULT], [1, 2]) for network in NETWORKS),
]


def keys_of(
    networks: Iterable[str],
    methods: Iterable[str],
    ratios: Sequence[float],
    seeds: Iterable[int],
    refit_images: int,
    recovery_epochs: float = 0.0,
) -> list[Key]:
    """The keys of the cells that are asked for, in the order in which they are run.

    Raises:
        ValueError: If a name is unknown.
    """
    for what, names, known in (("network", networks, NETWORKS), ("method", methods, METHODS)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"There is no {what} '{unknown[0]}'; choose from {', '.join(known)}.")
    wanted = set(product(networks, methods, seeds))
    # Seeds beyond those of the order come last.
    order = [*ORDER, *(([network], list(METHODS), list(seeds)) for network in networks)]
    keys = []
    for of_networks, of_methods, of_seeds in order:
        for network, seed, ratio, method in product(of_networks, of_seeds, ratios, of_methods):
            if (network, method, seed) not in wanted:
                continue
            images = refit_images if METHODS[method].refit else 0
            removed = (0.0, 0) if METHODS[method].plan is None else (ratio, seed)
            keys.append(Key(network, method, *removed, images, recovery_epochs))
    return list(dict.fromkeys(keys))
