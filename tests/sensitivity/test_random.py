import torch
from tiny import make_model

from hap_transformers import estimate_sensitivity


def test_depends_on_the_seed_alone():
    first, again, other = (estimate_sensitivity(make_model(), [], "random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.cat(first.heads), torch.cat(again.heads))
    assert not torch.equal(torch.cat(first.neurons), torch.cat(other.neurons))
    assert first.num_examples == 0 and first.reliability is None
