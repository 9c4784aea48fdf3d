"""Further families of causal language models: pruned as masked, refitted, saved and loaded."""

import copy

import pytest
import torch
import transformers

from hap_transformers import PruningPlan, apply_plan, estimate_sensitivity, plan_pruning, reconstruct
from hap_transformers.components.groups import find_groups
from hap_transformers.sensitivity.self_loss import SelfLoss


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "Gemma": {**GROUPED, "head_dim": 6},
    "Gemma2": {**GROUPED, "head_dim": 6, "query_pre_attn_scalar": 3},
    "Gemma3": {**GROUPED, "head_dim": 6, "query_pre_attn_scalar": 3},
    "GPTNeoX": {},
    "Granite": {**GROUPED, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "Olmo": GROUPED,
    "Olmo2": GROUPED,
    "Phi": {**GROUPED, "partial_rotary_factor": 0.5},
    "Phi3": {"partial_rotary_factor": 1.0},
}
IDS = torch.randint(3, 40, (8, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}{'Text' * (request.param == 'Gemma3')}Config")
    made = getattr(transformers, f"{request.param}ForCausalLM")(config(**SIZES, **FAMILIES[request.param]))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.double().eval()


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
