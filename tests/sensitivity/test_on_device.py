"""Sums and eliminations stay on the model's device: nothing is copied to the host, and nothing waits for it.

Tensors on the device "meta" have shapes, but no values: to copy them to the host, or to ask for a value, is an error.
"""

from types import SimpleNamespace

import pytest
import torch
from tiny import DIMENSIONS, make_model

from hap_transformers.components.groups import find_groups
from hap_transformers.sensitivity import kronecker, surgeon
from hap_transformers.sensitivity.statistics import SampleMoments


META = torch.device("meta")


def test_the_device_notices_copies_and_waits():
    tensor = torch.ones(3, device=META)
    for copied in (tensor.cpu, lambda: torch.zeros(3).copy_(tensor), lambda: torch.zeros(3) + tensor):
        with pytest.raises((NotImplementedError, RuntimeError)):
            copied()
    for asked in (lambda: int(tensor.argmin()), lambda: bool(tensor.isfinite().all()), lambda: tensor[tensor > 0]):
        with pytest.raises((NotImplementedError, RuntimeError)):
            asked()


@pytest.mark.parametrize("size, groups", [(1, 300), (4, 70), (256, 3)])
def test_eliminations(size, groups, monkeypatch):
    monkeypatch.setattr(surgeon, "_inverse", torch.linalg.inv)  # The only place that may ask, once.
    matrices = torch.ones(3, size * groups, size * groups, dtype=torch.float64, device=META)
    order, costs = surgeon.removal_costs(matrices, matrices.clone(), size)
    assert order.shape == costs.shape == (3, groups)
    assert order.device == costs.device == META


def test_layers_are_eliminated_together_and_groups_without_readers_too():
    groups = find_groups(make_model(), DIMENSIONS)
    together = list(kronecker._alike(SimpleNamespace(groups=groups, sums_device=META)))
    assert sorted(sum(together, [])) == list(range(len(groups)))
    for positions in together:
        assert len({(groups[i].kind, bool(groups[i].readers)) for i in positions}) == 1
        assert len(positions) > 1  # Both layers, or all their heads.


@pytest.mark.parametrize("add", ["examples", "probes"])
def test_sums_over_batches(add):
    moments = SampleMoments.zeros(5, 13, META)
    for number in range(3):
        values = torch.ones(4, 5, device=META)
        if add == "examples":
            moments.add_examples(values, 4 * number)
        else:
            moments.add_probes(values, 4, number)
        moments.add_sums(iter([torch.ones((), device=META), torch.ones(3, 4, device=META)]))
    assert moments.sums.dtype == torch.float64
