"""OLMo clips queries, keys and values in place."""

import copy

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from hap_transformers import align_heads, estimate_sensitivity


KINDS = ["query_key_dims", "value_dims", "neurons"]


def olmo(clip):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = OlmoConfig(vocab_size=50, **sizes, clip_qkv=clip, pad_token_id=0)
    return OlmoForCausalLM(config).eval()


@pytest.fixture
def batches():
    tokens = torch.randint(1, 50, (16, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}]


@pytest.mark.parametrize("method", ["kronecker", "gauss_newton_trace"])
def test_bounds_that_nothing_reaches_change_no_score(method, batches):
    found, wanted = (
        estimate_sensitivity(olmo(clip), batches, method, components=KINDS, progress=False) for clip in (1e4, None)
    )
    for kind in KINDS:
        torch.testing.assert_close(found.scores[kind], wanted.scores[kind], rtol=0, atol=0)


def test_another_basis_is_refused_where_values_are_clipped(batches):
    model = olmo(0.01)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"clip_qkv.*components=\['heads', 'neurons'\]"):
        align_heads(model, batches, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
