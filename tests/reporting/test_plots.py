import pytest
import torch
from tiny import hand_made, make_model

from hap_transformers import PruningPlan
from hap_transformers.reporting.plots import plot_head_sensitivity, plot_structure


def test_draws_negative_scores_and_crosses(tmp_path):
    sensitivity = hand_made("hessian_trace", heads=[torch.tensor([-1.0, 0.1, 2.0]), torch.tensor([0.0, 3.0, 1.0])])
    plot_head_sensitivity(sensitivity, tmp_path / "plain.png")
    plot_head_sensitivity(
        sensitivity, tmp_path / "crossed.png", PruningPlan({"heads": {0: [0]}}, "bert", {"heads": [3, 3]})
    )
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "crossed.png").read_bytes()


def test_refuses_layers_of_different_lengths(tmp_path):
    with pytest.raises(ValueError, match="not yet pruned"):
        plot_head_sensitivity(hand_made("gradient", heads=[torch.ones(2), torch.ones(3)]), tmp_path / "x.png")


def test_draws_what_is_left(tmp_path):
    model = make_model()
    plot_structure(model, tmp_path / "dense.png")
    model.prune_heads({0: range(4), 1: [0]})
    plot_structure(model, tmp_path / "pruned.png")
    assert (tmp_path / "dense.png").read_bytes() != (tmp_path / "pruned.png").read_bytes()
