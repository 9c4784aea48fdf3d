"""The mask-space Gauss-Newton matrix equals the explicit one."""

import pytest
import torch
from explicit import mask_of_ones, masked_logits
from tiny import make_batch, make_model
from zoo import HEADS, LAYERS

from hap_transformers import estimate_sensitivity


@pytest.mark.parametrize("num_labels", [2, 4])
def test_equals_the_explicit_matrix(scored_model_type, num_labels):
    model, batch = make_model(scored_model_type, num_labels=num_labels), make_batch(size=4)
    result = estimate_sensitivity(model, [batch], "fisher", progress=False)

    def logits_of(heads, neurons):
        return masked_logits(model, batch, heads, neurons)

    logits = logits_of(*mask_of_ones()).detach()
    hessian = torch.func.hessian(lambda z: torch.nn.functional.cross_entropy(z, batch["labels"]))(logits)
    jacobians = torch.func.jacrev(logits_of, argnums=(0, 1))(*mask_of_ones())
    jacobian = torch.cat([j.reshape(logits.numel(), -1) for j in jacobians], 1)
    matrix = jacobian.T @ hessian.reshape(logits.numel(), -1) @ jacobian
    heads = LAYERS * HEADS
    torch.testing.assert_close(result.interactions, matrix[:heads, :heads], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(torch.cat(result.heads), matrix.diagonal()[:heads] / 2, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(torch.cat(result.neurons), matrix.diagonal()[heads:] / 2, rtol=1e-9, atol=1e-14)


def test_batching_does_not_matter():
    model, batch = make_model(), make_batch(size=4)
    parts = [{k: v[i : i + n] for k, v in batch.items()} for i, n in ((0, 3), (3, 1))]
    whole = estimate_sensitivity(model, [batch], "fisher", progress=False)
    split = estimate_sensitivity(model, parts, "fisher", progress=False)
    torch.testing.assert_close(whole.heads, split.heads)
    torch.testing.assert_close(whole.neurons, split.neurons)
    torch.testing.assert_close(whole.interactions, split.interactions)
