"""The benchmark of convolutional networks on tiny ones."""

import pytest

from benchmarks.convnets import MODELS, Arguments, convnets_table, describe_convnets, measure


pytestmark = pytest.mark.any_release


@pytest.mark.parametrize("name", MODELS)
def test_half_of_the_parameters_go(name):
    args = Arguments(images=8, batch=4, ratio=0.5, rounds=1, image_size=32)
    row = measure(name, args, hidden_sizes=[16, 32], depths=[1, 2], num_stages=2)
    assert 0.4 < row["parameters"] <= 0.5 and 0 < row["flops"] < 1 and row["time"] > 0
    about = {"images": 8, "batch": 4, "ratio": 0.5, "image_size": 32, "threads": 1, "torch": "2"}
    line = convnets_table({"rows": [row]}).splitlines()[-1]
    assert line.startswith(f"| {name} |") and f"{row['flops'] / row['time']:.2f} | 0.80 |" in line
    assert describe_convnets({"rows": [row], **about}).startswith("50 % of the blocks' parameters")
