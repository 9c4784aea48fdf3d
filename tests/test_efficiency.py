import pytest
import torch
from conftest import make_batch, make_model
from zoo import HIDDEN

from hap_transformers.efficiency import compare_latency, count_flops, count_parameters


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_of_a_head_by_hand(attention):
    model, batch = make_model(dtype=torch.float32, attn_implementation=attention), make_batch(size=3, length=7)
    dense = count_flops(model, batch)
    model.prune_heads({0: [2]})
    tokens, head_dim = 3 * 7, 4
    projections = 4 * 2 * tokens * HIDDEN * head_dim
    scores_and_context = 2 * 2 * tokens * 7 * head_dim
    assert dense - count_flops(model, batch) == projections + scores_and_context


def test_shared_parameters_count_once():
    model = make_model()
    before = count_parameters(model)
    model.classifier.weight = torch.nn.Parameter(torch.zeros(2, HIDDEN))
    model.tied = model.classifier
    assert count_parameters(model) == before


def test_measuring_leaves_the_mode_alone():
    model, batch = make_model(dtype=torch.float32).train(), make_batch()
    model.classifier.eval()
    count_flops(model, batch)
    seconds = compare_latency({"model": model}, batch, repeats=1)
    assert seconds["model"] > 0
    assert model.training and not model.classifier.training
