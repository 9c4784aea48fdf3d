"""Mask gradients against finite differences of masks."""

import copy

import torch
from conftest import HEADS, OUTPUTS, make_batch, make_model

from hap_transformers import estimate_sensitivity


def test_equals_finite_differences(model_type):
    model, batch, step = make_model(model_type), make_batch(), 1e-6
    result = estimate_sensitivity(model, [batch], "gradient", progress=False)

    def losses(layer, head, mask):
        masked = copy.deepcopy(model)
        weight = masked.get_submodule(OUTPUTS[model_type].format(layer)).weight.data
        weight.view(weight.shape[0], HEADS, -1)[:, head] *= mask
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return torch.nn.functional.cross_entropy(masked(**inputs).logits, batch["labels"], reduction="none").detach()

    for layer, scores in enumerate(result.heads):
        slopes = [(losses(layer, h, 1 + step) - losses(layer, h, 1 - step)) / (2 * step) for h in range(HEADS)]
        expected = torch.stack(slopes).abs().mean(1)
        torch.testing.assert_close(scores, expected / expected.norm(), rtol=1e-6, atol=1e-8)


def test_batching_does_not_matter():
    model, batch = make_model(), make_batch(size=4)
    parts = [{k: v[i : i + n] for k, v in batch.items()} for i, n in ((0, 3), (3, 1))]
    whole = estimate_sensitivity(model, [batch], "gradient", progress=False)
    split = estimate_sensitivity(model, parts, "gradient", progress=False)
    torch.testing.assert_close(whole.heads, split.heads)
