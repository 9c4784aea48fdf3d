"""Further families of causal language models: pruned as masked, refitted, saved and loaded."""

import copy

import pytest
import torch
from decoders import DECODERS

from hap_transformers import PruningPlan, apply_plan, estimate_sensitivity, plan_pruning, reconstruct
from hap_transformers.components.groups import find_groups
from hap_transformers.sensitivity.self_loss import SelfLoss


IDS = torch.randint(3, 40, (8, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=DECODERS)
def model(request):
    return DECODERS[request.param].model()


def removed(model):
    """A plan that leaves every group of the first layer and one of the second something."""
    return {
        group.kind.name: {0: [0], 1: list(range(group.num_components)) if group.kind.name == "heads" else [3, 4, 9]}
        for group in find_groups(model)
    }


def test_a_pruned_model_is_the_masked_one(model, tmp_path):
    gone = removed(model)
    expected = copy.deepcopy(model)
    for group in find_groups(expected):
        columns = group.reader.module.weight.data.T.unflatten(0, (group.num_components, -1))
        columns[gone[group.kind.name][group.layer]] = 0
    pruned = copy.deepcopy(model)
    apply_plan(pruned, PruningPlan.for_model(pruned, **gone))
    torch.testing.assert_close(pruned(IDS).logits, expected(IDS).logits)
    pruned.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path).double()(IDS).logits, pruned(IDS).logits)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(pruned.generate(IDS[:2], **settings), expected.generate(IDS[:2], **settings, use_cache=False))


def test_what_the_surgeon_removes_is_refitted(model):
    batches = [
        {"input_ids": ids} for ids in torch.randint(3, 40, (6, 8, 12), generator=torch.Generator().manual_seed(1))
    ]
    sensitivity = estimate_sensitivity(model, batches, loss_fn=SelfLoss(), progress=False)
    pruned = copy.deepcopy(model)
    apply_plan(pruned, plan_pruning(sensitivity, pruned, ratio=0.4))
    before = (pruned(IDS).logits - model(IDS).logits).norm()
    reconstruct(pruned, copy.deepcopy(model), batches, progress=False)
    assert (pruned(IDS).logits - model(IDS).logits).norm() < before
