"""Groups wider than 128 are scored in finite time with several threads, and by the formula."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hap_transformers import estimate_sensitivity
from hap_transformers.sensitivity.surgeon import removal_costs


pytestmark = pytest.mark.any_release
RIDGE = 0.01
# Three query heads of 64 to a key/value head (SmolLM2), and four of 128 (Llama 3).
WIDTHS = {192: 4, 512: 2}


def factors(width):
    """The moment and the curvature of a few groups, symmetric positive definite."""
    generator, size = torch.Generator().manual_seed(width), width * WIDTHS[width]
    inputs, outputs = (torch.randn(2 * size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    return inputs.T @ inputs / len(inputs), outputs.T @ outputs / len(outputs)


def in_this_process(folder):
    """Costs of wide groups and the scores of a model of SmolLM2's shape, with two threads."""
    torch.set_num_threads(2)
    costs = {}
    for width in WIDTHS:
        costs[f"order.{width}"], costs[f"costs.{width}"] = removal_costs(*factors(width), size=width, ridge=RIDGE)
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=60, **sizes))
    ids = torch.randint(0, 60, (4, 16))
    scores = estimate_sensitivity(model, [{"input_ids": ids, "labels": ids}], progress=False)
    save_file({**costs, "heads": scores.heads[0]}, f"{folder}/scores.safetensors")


@pytest.fixture(scope="module")
def with_two_threads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # Threads that wait leave the cores to other workers.
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=120, env=environment)
    return load_file(folder / "scores.safetensors")


@pytest.mark.parametrize("width", WIDTHS)
def test_costs_of_wide_groups_equal_the_explicit_inverses(with_two_threads, width):
    moment, curvature = (matrix.numpy() for matrix in factors(width))
    inverse = np.linalg.inv(moment + RIDGE * np.diag(moment).mean() * np.eye(len(moment)))

    def cost(groups):
        """What it costs to remove some groups at once and to refit the others."""
        features = np.concatenate([np.arange(group * width, (group + 1) * width) for group in groups])
        block = np.ix_(features, features)
        return np.trace(curvature[block] @ np.linalg.inv(inverse[block])) / 2

    order, costs = (with_two_threads[f"{name}.{width}"].numpy() for name in ("order", "costs"))
    alone = [cost([group]) for group in range(WIDTHS[width])]
    assert order[0] == np.argmin(alone)
    np.testing.assert_allclose(costs[0], min(alone), rtol=1e-8)
    together = [cost(order[: count + 1]) for count in range(len(order))]
    np.testing.assert_allclose(costs.cumsum(), together, rtol=1e-8)


def test_a_model_of_real_width_is_scored_with_two_threads(with_two_threads):
    assert with_two_threads["heads"].shape == (3,)
    assert with_two_threads["heads"].isfinite().all() and (with_two_threads["heads"] > 0).all()


if __name__ == "__main__":
    in_this_process(sys.argv[1])
