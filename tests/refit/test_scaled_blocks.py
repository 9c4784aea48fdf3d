"""Refits of blocks whose output is scaled, or comes in windows, before it is added to the residual stream."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from towers import dinov2, images, swin
from transformers.models.swin.modeling_swin import window_partition
from zoo import ZOO

from hap_transformers import PruningPlan, apply_plan, reconstruct
from hap_transformers.components.groups import find_groups, in_forward_order, layers


RIDGE = 0.01
GONE = {"heads": {0: [1]}, "neurons": {0: [0, 3], 1: [1, 2]}}
MODELS = {
    "dinov2": lambda: (dinov2(False), 8, "norm2", ("layer_scale1.lambda1", "layer_scale2.lambda1")),
    "beit": lambda: (ZOO["beit"].model(), 8, "layernorm_after", ("lambda_1", "lambda_2")),
    "swin": lambda: (swin(), 24, "layernorm_after", ()),
}


def streams_of(model, norm, pixels):
    """The residual stream before and after both blocks of every layer, and what their output projections read."""
    streams, read, handles = {}, {}, []
    for number, layer in enumerate(layers(model)):

        def enter(module, args, kwargs, number=number):
            streams[number, 0] = args[0] if args else kwargs["hidden_states"]

        def leave(module, args, output, number=number):
            streams[number, 2] = output[0] if isinstance(output, tuple) else output

        def between(module, args, number=number):
            streams[number, 1] = args[0]

        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.register_forward_hook(leave))
        handles.append(layer.get_submodule(norm).register_forward_pre_hook(between))
    for group in find_groups(model):
        key = group.layer, ("heads", "neurons").index(group.kind.name)
        reader = group.reader.module
        handles.append(reader.register_forward_pre_hook(lambda m, args, key=key: read.update({key: args[0]})))
    with torch.no_grad():
        model(pixels)
    for handle in handles:
        handle.remove()
    return streams, read


def in_windows(layer, tokens):
    """Rows of the residual stream as Swin's own function arranges them, and which of them are no padding."""
    side, shift, height = layer.window_size, layer.shift_size, int(tokens.shape[1] ** 0.5)

    def arranged(values):
        image = values.unflatten(1, (height, height))
        image = F.pad(image, (0, 0, 0, -height % side, 0, -height % side))
        return window_partition(torch.roll(image, (-shift, -shift), (1, 2)), side).flatten(0, 2)

    return arranged(tokens), arranged(torch.ones_like(tokens[..., :1]))[:, 0] > 0


@pytest.mark.parametrize("name", MODELS)
def test_equals_least_squares_on_the_stream(name):
    """Every output projection is the ridge regression of the dense stream on what is there, divided by the scale."""
    dense, size, norm, scales = MODELS[name]()
    pixels, smaller = images(size, 12), copy.deepcopy(dense)
    apply_plan(smaller, PruningPlan.for_model(smaller, **GONE))
    before = copy.deepcopy(smaller)
    reconstruct(smaller, dense, [{"pixel_values": pixels}], ridge=RIDGE, progress=False)
    wanted, _ = streams_of(dense, norm, pixels)
    found, read = streams_of(smaller, norm, pixels)
    moved = 0
    for group, old in zip(in_forward_order(find_groups(smaller)), in_forward_order(find_groups(before)), strict=True):
        layer, block = layers(smaller)[group.layer], ("heads", "neurons").index(group.kind.name)
        missing = wanted[group.layer, block + 1] - found[group.layer, block]
        inputs = read[group.layer, block].flatten(0, 1)
        if name == "swin" and block == 0:
            missing, real = in_windows(layer, missing)
            missing, inputs = missing[real], inputs[real]
        if scales:
            missing = missing / layer.get_parameter(scales[block]).detach()
        x, y = inputs.numpy(), missing.flatten(0, -2).numpy()
        W, b = (parameter.detach().numpy() for parameter in (old.reader.module.weight, old.reader.module.bias))
        centred = x - x.mean(0)
        penalty = RIDGE * np.mean(np.diag(centred.T @ centred)) * np.eye(x.shape[1])
        expected = W + np.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - y.mean(0) - centred @ W.T)).T
        bias = y.mean(0) - expected @ x.mean(0)
        np.testing.assert_allclose(group.reader.module.weight.detach().numpy(), expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(group.reader.module.bias.detach().numpy(), bias, rtol=1e-6, atol=1e-7)
        moved += int(np.abs(expected - W).max() > 1e-3)
    assert moved >= 4
    with torch.no_grad():
        logits = [model(pixels).logits for model in (dense, before, smaller)]
    assert (logits[2] - logits[0]).norm() < 0.5 * (logits[1] - logits[0]).norm()


def test_a_scale_of_zero_leaves_its_output_as_it_was():
    dense = dinov2(False)
    layers(dense)[0].layer_scale2.lambda1.data[3] = 0
    smaller, pixels = copy.deepcopy(dense), images(8, 12)
    apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: [0, 3]}))
    (group, _), before = find_groups(smaller, ["neurons"]), copy.deepcopy(smaller)
    weight = find_groups(before, ["neurons"])[0].reader.module.weight
    reconstruct(smaller, dense, [{"pixel_values": pixels}], progress=False)
    changes = (group.reader.module.weight - weight).abs().amax(1)
    assert changes[3] < 1e-9 and (changes.sort().values[1:] > 1e-6).all()
