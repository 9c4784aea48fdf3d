"""A linear map is the same matrix, however its module stores it."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hap_transformers.components.projections import find_projections, make_projection


OUTPUTS, INPUTS, PARTS = 6, 4, 3


@pytest.fixture(params=["Linear", "Conv1D"])
def module(request):
    module = nn.Linear(INPUTS, OUTPUTS) if request.param == "Linear" else Conv1D(OUTPUTS, INPUTS)
    with torch.no_grad():
        module.weight.normal_()
        module.bias.normal_()
    return module.double()


def outputs(module, x):
    return module(x).detach()


def test_parts_are_slices_of_the_outputs(module):
    x = torch.randn(5, INPUTS, dtype=torch.float64)
    projections = find_projections(
        nn.ModuleDict({"layer": nn.ModuleDict({"fused": module})}), "layer.", ("fused",) * 3
    )
    found = []
    for projection in projections:
        assert (projection.out_features, projection.in_features) == (OUTPUTS // PARTS, INPUTS)
        found.append(x @ projection.matrix(module.weight).T + projection.outputs_of(module.bias))
    torch.testing.assert_close(torch.cat(found, 1), outputs(module, x))
    assert sum(projection.weights_by_rows() for projection in projections) == OUTPUTS * (INPUTS + 1)


def test_keeps_outputs_and_inputs(module):
    x = torch.randn(5, INPUTS, dtype=torch.float64)
    rows, columns = torch.tensor([4, 1]), torch.tensor([0, 3])
    matrix, bias = make_projection("", module).matrix(module.weight).detach().clone(), module.bias.detach().clone()
    module.bias.requires_grad_(False)
    make_projection("", module).keep(rows, outputs=True)
    torch.testing.assert_close(outputs(module, x), x @ matrix[rows].T + bias[rows])
    make_projection("", module).keep(columns, outputs=False)
    torch.testing.assert_close(outputs(module, x[:, columns]), x[:, columns] @ matrix[rows][:, columns].T + bias[rows])
    assert module.weight.requires_grad and not module.bias.requires_grad


def test_writes_a_part(module):
    x = torch.randn(5, INPUTS, dtype=torch.float64)
    before = outputs(module, x)
    matrix, bias = torch.randn(2, INPUTS, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    make_projection("", module, part=1, parts=PARTS).write(matrix, bias)
    after = outputs(module, x)
    torch.testing.assert_close(after[:, 2:4], x @ matrix.T + bias)
    assert torch.equal(after[:, :2], before[:, :2]) and torch.equal(after[:, 4:], before[:, 4:])


def test_what_is_plain(module):
    assert make_projection("", module).is_plain
    module.bfloat16()
    assert make_projection("", module).is_plain
    module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    assert not make_projection("", module).is_plain
    assert not make_projection("", nn.LayerNorm(4)).is_plain


def test_a_missing_module_is_named():
    model = nn.ModuleDict({"layer": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match="'layer' of ModuleDict has no module 'fused'"):
        find_projections(model, "layer.", ("fused",))
    assert find_projections(model, "layer.", ("fused",), optional=True) == []
