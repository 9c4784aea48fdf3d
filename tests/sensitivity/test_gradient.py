"""Mask gradients equal finite differences of masks."""

import torch
from explicit import mask_of_ones, masked_logits
from tiny import make_batch, make_model
from zoo import HEADS, LAYERS

from hap_transformers import estimate_sensitivity


def test_equals_finite_differences(scored_model_type):
    model, batch, step = make_model(scored_model_type), make_batch(), 1e-6
    result = estimate_sensitivity(model, [batch], "gradient", progress=False)

    def slope(kind, layer, component):
        losses = []
        for sign in (1, -1):
            masks = mask_of_ones()
            masks[kind][layer, component] += sign * step
            logits = masked_logits(model, batch, *masks).detach()
            losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
        return ((losses[0] - losses[1]) / (2 * step)).abs().mean()

    for layer in range(LAYERS):
        heads = torch.stack([slope(0, layer, head) for head in range(HEADS)])
        torch.testing.assert_close(result.heads[layer], heads / heads.norm(), rtol=1e-6, atol=1e-8)
        neurons = torch.stack([slope(1, layer, neuron) for neuron in range(24)])
        torch.testing.assert_close(result.neurons[layer], neurons, rtol=1e-5, atol=1e-8)


def test_batching_does_not_matter():
    model, batch = make_model(), make_batch(size=4)
    parts = [{k: v[i : i + n] for k, v in batch.items()} for i, n in ((0, 3), (3, 1))]
    whole = estimate_sensitivity(model, [batch], "gradient", progress=False)
    split = estimate_sensitivity(model, parts, "gradient", progress=False)
    torch.testing.assert_close(whole.heads, split.heads)
    torch.testing.assert_close(whole.neurons, split.neurons)
