"""Modules that have lost components, some or all, behave as masked ones do, wherever modules are used."""

import copy
import pickle

import pytest
import torch
from accelerate import dispatch_model
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ALL_HEADS, ALL_NEURONS, LAYERS, ZOO, logits, masked_logits

from hap_transformers import PruningPlan, apply_plan


class CountProducts(TorchDispatchMode):
    """Counts matrix products and attention kernels."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += any(name in str(function) for name in (".mm.", "bmm.", "addmm.", "scaled_dot_product"))
        return function(*args, **(kwargs or {}))


def test_emptied_layers_multiply_no_matrices(model_type):
    """What is left is the residual path plus the output bias."""
    tiny = ZOO[model_type]
    model = tiny.model(torch.float32)
    apply_plan(model, PruningPlan.for_model(model, heads={0: ALL_HEADS}, neurons={0: ALL_NEURONS}))
    products = []
    with CountProducts() as counter, torch.no_grad():
        for layer in range(LAYERS):
            module = model.get_submodule(tiny.layer.format(layer))
            module.register_forward_pre_hook(lambda *_: products.append(-counter.products))
            module.register_forward_hook(lambda *_: products.append(products.pop() + counter.products))
        logits(model, tiny)
    if model_type == "albert":  # Two calls share a layer's weights.
        products = products[::2]
    assert products[0] == 0 and products[1] > 0


def test_pickled_and_copied(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    apply_plan(model, PruningPlan.for_model(model, heads={0: ALL_HEADS, 1: [1]}, neurons={1: ALL_NEURONS}))
    expected = logits(model, tiny)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        torch.testing.assert_close(logits(other, tiny), expected, rtol=0, atol=1e-12)


def test_pruned_after_recording_attention_maps(model_type):
    """Transformers 4 leaves the dense forward methods in the modules when it has recorded attention maps."""
    tiny = ZOO[model_type]
    model = tiny.model(attn_implementation="eager")
    heads, neurons = {0: ALL_HEADS, 1: [0]}, {0: [3], 1: ALL_NEURONS}
    expected = masked_logits(model, tiny, heads, neurons)
    model(**tiny.batch(), output_attentions=True)
    apply_plan(model, PruningPlan.for_model(model, heads=heads, neurons=neurons))
    torch.testing.assert_close(logits(model, tiny), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "mpnet", "t5"])
def test_models_dispatched_by_accelerate(model_type):
    tiny = ZOO[model_type]
    model = tiny.model()
    heads, neurons = {0: ALL_HEADS, 1: [0]}, {0: [3], 1: ALL_NEURONS}
    expected = masked_logits(model, tiny, heads, neurons)
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    apply_plan(model, PruningPlan.for_model(model, heads=heads, neurons=neurons))
    torch.testing.assert_close(logits(model, tiny), expected, rtol=0, atol=1e-10)


def test_no_gradient_is_awaited_that_cannot_come(model_type):
    """DistributedDataParallel waits for every parameter that requires a gradient."""
    tiny = ZOO[model_type]
    model = tiny.model()
    without = {name for name, p in model.named_parameters() if not _has_gradient(model, tiny, name, p)}
    apply_plan(model, PruningPlan.for_model(model, heads={0: ALL_HEADS}, neurons={0: ALL_NEURONS, 1: ALL_NEURONS}))
    model.zero_grad()
    logits(model, tiny).square().sum().backward()
    waiting = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert waiting <= without


def _has_gradient(model, tiny, name, parameter):
    if parameter.grad is None:
        logits(model, tiny).square().sum().backward()
    return parameter.grad is not None
