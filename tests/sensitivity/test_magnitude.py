import copy

import pytest
from tiny import make_model

from hap_transformers import estimate_sensitivity


def test_is_the_norm_of_what_a_component_owns():
    model = make_model()
    before = estimate_sensitivity(model, [], "magnitude")
    changed = copy.deepcopy(model)
    layer = changed.bert.encoder.layer[1]
    layer.attention.self.value.weight.data[5] *= 2  # A row of head 1.
    layer.output.dense.weight.data[:, 7] *= 3  # The column of neuron 7.
    after = estimate_sensitivity(changed, [], "magnitude")
    row = model.bert.encoder.layer[1].attention.self.value.weight[5].square().sum()
    column = model.bert.encoder.layer[1].output.dense.weight[:, 7].square().sum()
    assert after.heads[1][1].item() == pytest.approx((before.heads[1][1] ** 2 + 3 * row).sqrt().item())
    assert after.neurons[1][7].item() == pytest.approx((before.neurons[1][7] ** 2 + 8 * column).sqrt().item())
    pairs = zip(before.heads + before.neurons, after.heads + after.neurons, strict=True)
    differing = [(a != b).sum().item() for a, b in pairs]
    assert differing == [0, 1, 0, 1]
