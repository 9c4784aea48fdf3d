"""Costs of removal equal those from the inverse of the whole curvature matrix C (x) A."""

import pytest
import torch

from hap_transformers.sensitivity import surgeon
from hap_transformers.sensitivity.surgeon import removal_costs


OUTPUTS, INPUTS = 3, 12


def random_problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs, cotangents = (
        torch.randn(50, n, generator=generator, dtype=torch.float64) @ torch.randn(n, n, generator=generator).double()
        for n in (INPUTS, OUTPUTS)
    )
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64)
    return inputs.T @ inputs / 50, cotangents.T @ cotangents / 50, weight


def explicit_cost(moment, cotangents, weight, removed):
    """1/2 w_S^T [(H^-1)_SS]^-1 w_S with H = C (x) A: the least rise of the loss with the weights S at zero."""
    index = [o * INPUTS + i for o in range(OUTPUTS) for i in removed]
    inverse = torch.linalg.inv(torch.kron(cotangents, moment))[index][:, index]
    weights = weight.flatten()[index]
    return float(weights @ torch.linalg.solve(inverse, weights) / 2)


@pytest.mark.parametrize("delayed", [1, 5, 128])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_the_explicit_matrix(size, delayed, monkeypatch):
    monkeypatch.setattr(surgeon, "DELAYED", delayed)
    moment, cotangents, weight = random_problem()
    ridged = moment + 0.01 * moment.diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
    order, costs = removal_costs(moment, weight.T @ cotangents @ weight, size, ridge=0.01)
    removed, total = [], 0.0
    for group, cost in zip(order.tolist(), costs.tolist(), strict=True):
        left = [g for g in range(INPUTS // size) if g * size not in removed]
        totals = {
            g: explicit_cost(ridged, cotangents, weight, removed + list(range(g * size, (g + 1) * size))) for g in left
        }
        assert group == min(totals, key=totals.get)
        assert cost == pytest.approx(totals[group] - total, rel=1e-8)
        total = totals[group]
        removed += list(range(group * size, (group + 1) * size))


@pytest.mark.parametrize("delayed", [5, 128])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("one_in", [2, 4])
def test_steps_of_several_groups(size, one_in, delayed, monkeypatch):
    """Costs are exact for the order; each step takes the groups that were cheapest before it."""
    monkeypatch.setattr(surgeon, "DELAYED", delayed)
    monkeypatch.setattr(surgeon, "ONE_IN", one_in)
    moment, cotangents, weight = random_problem()
    ridged = moment + 0.01 * moment.diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
    order, costs = removal_costs(moment, weight.T @ cotangents @ weight, size)
    order, groups = order.tolist(), INPUTS // size

    def total(chosen):
        inputs = [group * size + i for group in chosen for i in range(size)]
        return explicit_cost(ridged, cotangents, weight, inputs) if inputs else 0.0

    for place, cost in enumerate(costs.tolist()):
        assert cost == pytest.approx(total(order[: place + 1]) - total(order[:place]), rel=1e-8)
    done = 0
    while done < groups:  # A step ends where the stored updates are full.
        in_round = min(max(delayed // size, 1), groups - done)
        at_once, end = max((groups - done) // one_in, 1), done + in_round
        while done < end:
            step = order[done : done + min(at_once, end - done)]
            now = {g: total([*order[:done], g]) for g in range(groups) if g not in order[:done]}
            assert set(step) == set(sorted(now, key=now.get)[: len(step)])
            done += len(step)


@pytest.mark.parametrize("delayed", [2, 128])
@pytest.mark.parametrize("size", [1, 3])
def test_several_maps_are_worked_on_as_each_alone(size, delayed, monkeypatch):
    """Each has an order of its own."""
    monkeypatch.setattr(surgeon, "DELAYED", delayed)
    problems = [random_problem(seed) for seed in range(4)]
    moments = torch.stack([moment for moment, _, _ in problems])
    curvatures = torch.stack([weight.T @ cotangents @ weight for _, cotangents, weight in problems])
    before = moments.clone(), curvatures.clone()
    orders, costs = removal_costs(moments, curvatures, size)
    assert torch.equal(moments, before[0]) and torch.equal(curvatures, before[1])
    assert len({tuple(order) for order in orders.tolist()}) > 1
    for alone, order, cost in zip(zip(moments, curvatures, strict=True), orders, costs, strict=True):
        expected = removal_costs(*alone, size)
        assert order.tolist() == expected[0].tolist()
        torch.testing.assert_close(cost, expected[1], rtol=1e-9, atol=1e-12)


def test_what_others_can_make_up_for_costs_nothing():
    """Inputs 0 and 1 are the same; 2 is constant."""
    moment, cotangents, weight = random_problem()
    moment[1], moment[:, 1] = moment[0], moment[:, 0]
    moment[1, 1] = moment[0, 0]
    moment[2] = moment[:, 2] = 0
    order, costs = removal_costs(moment, weight.T @ cotangents @ weight, ridge=1e-9)
    assert set(order[:2].tolist()) <= {0, 1, 2}
    assert costs[1] < 1e-6 * costs[2]


def test_inputs_that_never_change():
    order, costs = removal_costs(torch.zeros(4, 4).double(), torch.eye(4).double())
    assert sorted(order.tolist()) == [0, 1, 2, 3] and costs.abs().max() < 1e-100


def test_units_of_inputs_do_not_matter():
    """With a ridge by input an input in other units, its weights in the inverse ones, costs the same to remove."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(50, 6, generator=generator).double(), torch.randn(4, 6, generator=generator).double()
    units = torch.tensor([1.0, 1e3, 1.0, 0.1, 5.0, 1.0]).double()
    expected = removal_costs(rows.T @ rows, weight.T @ weight, ridge=0.1, by_input=True)
    rows, weight = rows * units, weight / units
    found = removal_costs(rows.T @ rows, weight.T @ weight, ridge=0.1, by_input=True)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    # A mean that one input makes hides what the others do.
    by_mean = removal_costs(rows.T @ rows, weight.T @ weight, ridge=0.1)
    assert (by_mean[1].sort().values[:5] > 100 * expected[1].sort().values[:5]).any()
