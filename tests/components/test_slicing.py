"""Slicing keeps dtype, hooks and `requires_grad`, and refuses weights that it cannot slice."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from tiny import make_batch, make_model, untouched
from torch import nn
from zoo import NEURONS

from hap_transformers import PruningPlan, apply_plan, prune_heads


def test_keeps_dtype_hooks_and_requires_grad():
    model = make_model(dtype=torch.bfloat16)
    query, intermediate = (
        model.bert.encoder.layer[0].attention.self.query,
        model.bert.encoder.layer[0].intermediate.dense,
    )
    query.weight.requires_grad_(False)
    intermediate.bias.requires_grad_(False)
    calls = []
    query.register_forward_hook(lambda *_: calls.append(1))
    apply_plan(model, PruningPlan.for_model(model, heads={0: [0]}, neurons={0: [0]}))
    model(**make_batch())
    assert calls == [1]
    assert query.weight.dtype == intermediate.weight.dtype == torch.bfloat16
    assert not query.weight.requires_grad and query.bias.requires_grad
    assert intermediate.weight.requires_grad and not intermediate.bias.requires_grad


def quantize(model):
    dense = model.bert.encoder.layer[1].output.dense
    dense.weight = nn.Parameter(dense.weight.to(torch.int8), requires_grad=False)


class Adapter(nn.Module):
    """Holds a layer, and shows its weights as PEFT's adapters do."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias


def wrap(model):
    model.bert.encoder.layer[1].output.dense = Adapter(model.bert.encoder.layer[1].output.dense)


def parametrize(model):
    model.bert.encoder.layer[1].output.dense = nn.utils.parametrizations.weight_norm(nn.Linear(NEURONS, 16))


def tie(model):
    first, second = (layer.intermediate.dense for layer in model.bert.encoder.layer)
    second.weight = first.weight


@pytest.mark.parametrize(
    "change, message",
    [
        (
            quantize,
            "'encoder.layer.1.output.dense' is a torch.*.Linear of dtype torch.int8.*Prune before quantizing",
        ),
        (wrap, "'encoder.layer.1.output.dense' is a .*.Adapter.*merge adapters"),
        (parametrize, "'encoder.layer.1.output.dense' are computed from parametrizations.*Remove the parametrization"),
        (tie, "'encoder.layer.1.intermediate.dense' shares a weight with 'encoder.layer.0.intermediate.dense'"),
    ],
)
def test_weights_that_cannot_be_sliced_are_refused(change, message):
    model = make_model()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={1: [0]}))
    assert untouched(model, before)
    prune_heads(model, {1: [0]})  # The rest can be pruned.


def test_offloaded_weights_are_refused():
    model = cpu_offload(make_model())
    with pytest.raises(ValueError, match="query' are not in memory but offloaded.*Nothing was pruned"):
        model.prune_heads({0: [0]})
