import pytest
import torch
from matplotlib.axes import Axes
from tiny import hand_made, make_model

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.reporting.plots import plot_head_ranks, plot_head_sensitivity, plot_structure
from hap_transformers.reporting.ranks import head_ranks


pytestmark = pytest.mark.usefixtures("drawn")


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


def test_ranks_of_heads(tmp_path, monkeypatch):
    """Every number that is drawn is that of the record, and every panel has a kind's name."""
    model = make_model()
    with pytest.raises(ValueError, match="The heads of this BertForSequenceClassification are whole"):
        plot_head_ranks(model, tmp_path / "ranks.png")
    apply_plan(model, PruningPlan.for_model(model, value_dims={0: [0, 5, 6]}, query_key_dims={1: [4, 5, 6, 7]}))
    drawn = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **style: drawn.append((x, y, text)))
    plot_head_ranks(model, tmp_path / "ranks.png")
    expected = {"query_key_dims": [[4, 4, 4, 4], [4, 0, 4, 4]], "value_dims": [[3, 2, 4, 4], [4, 4, 4, 4]]}
    assert head_ranks(model) == expected
    assert drawn == [
        (head, layer, str(rank))
        for rows in expected.values()
        for layer, row in enumerate(rows)
        for head, rank in enumerate(row)
    ]
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    plot_structure(model, tmp_path / "structure.png")


def test_ranks_of_heads_that_rotate(tmp_path):
    """Their query/key dimensions go in pairs, or together, and count one by one all the same."""
    model = make_model("qwen3")
    apply_plan(model, PruningPlan.for_model(model, query_key_dims={0: [1]}))
    assert head_ranks(model)["query_key_dims"] == [[6, 0, 6, 6], [6, 6, 6, 6]]
    model = make_model("mistral")
    apply_plan(model, PruningPlan.for_model(model, query_key_dims={0: [0, 2, 3, 4, 5]}))
    assert head_ranks(model)["query_key_dims"] == [[2, 0, 6, 6], [6, 6, 6, 6]]
    plot_head_ranks(model, tmp_path / "ranks.png")
