"""A head whose value dimensions all go takes its query/key dimensions along, and what attention does with it."""

import copy
import re

import pytest
import torch
from dims import left_of
from zoo import HEADS, LAYERS, ZOO

from hap_transformers import PruningPlan, Sensitivity, apply_plan, estimate_sensitivity, plan_pruning
from hap_transformers.components.groups import find_groups, layers
from hap_transformers.efficiency import count_encoder_parameters, count_flops, count_flops_by_module, count_parameters


DIMS = ["query_key_dims", "value_dims", "neurons"]


def made_scores(model, cheap):
    """Scores by which some heads' value dimensions are cheapest, by far, and all query/key dimensions dearest."""
    scores = {}
    for kind in DIMS:
        groups = find_groups(model, [kind])
        scores[kind] = [torch.rand(g.num_components, dtype=torch.float64) + 1 for g in groups]
    for layer, heads in cheap.items():
        size = len(scores["value_dims"][layer]) // HEADS
        for head in heads:
            scores["value_dims"][layer][head * size : (head + 1) * size] *= 1e-6
    scores["query_key_dims"] = [values * 1e6 for values in scores["query_key_dims"]]
    return Sensitivity("made", scores=scores, comparable=True, foresees_refit=True)


@pytest.mark.parametrize("budget", ["params", "flops"])
@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "gpt2", "llama", "mpnet", "t5"])
def test_query_key_dimensions_of_heads_that_are_gone_are_free(model_type, budget):
    tiny = ZOO[model_type]
    model, batch = tiny.model(), tiny.batch()
    scores = made_scores(model, {0: [1], 1: [0, 3]})
    plan = plan_pruning(scores, model, budget=budget, ratio=0.25, inputs=batch, neuron_multiple=1)
    apply_plan(model, plan)
    alive = [
        [count > 0 for group in find_groups(model, [kind]) for count in left_of(group)]
        for kind in ("query_key_dims", "value_dims")
    ]
    assert alive[0] == alive[1] and not any(alive[0][place] for place in (1, HEADS, HEADS + 3))
    assert plan.promise == {"parameters": count_parameters(model), "flops": count_flops(model, batch)}


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "mistral", "qwen3"])
def test_budgets_are_met_and_promises_kept(model_type, ratio):
    tiny = ZOO[model_type]
    dense, batch = tiny.model(), tiny.batch(4)
    batch_with_labels = {**batch, "labels": torch.arange(4) % 2}
    scores = estimate_sensitivity(dense, [batch_with_labels], components=DIMS, progress=False)
    model = copy.deepcopy(dense)
    plan = plan_pruning(scores, model, budget="flops", ratio=ratio, inputs=batch, neuron_multiple=1)
    apply_plan(model, plan)
    assert plan.promise["flops"] == count_flops(model, batch)
    plan = plan_pruning(scores, dense, ratio=ratio, neuron_multiple=1)
    smaller = copy.deepcopy(dense)
    apply_plan(smaller, plan)
    assert count_encoder_parameters(smaller) <= (1 - ratio) * count_encoder_parameters(dense)


def test_a_second_plan_knows_what_the_first_has_saved():
    """The share is of the dense model's FLOPs, of which heads that are gone have none."""
    tiny = ZOO["bert"]
    model, batch = tiny.model(), tiny.batch()
    apply_plan(model, plan_pruning(made_scores(model, {0: [1, 2]}), model, ratio=0.2, neuron_multiple=1))
    scores = estimate_sensitivity(
        model, [{**batch, "labels": torch.tensor([0, 1, 1])}], components=DIMS, progress=False
    )
    plan = plan_pruning(scores, model, budget="flops", ratio=0.5, inputs=batch, neuron_multiple=1)
    apply_plan(model, plan)
    assert plan.promise["flops"] == count_flops(model, batch)


def test_parts_make_up_for_what_their_components_do_not_reach():
    """Nearly all FLOPs of a layer belong to components, and the rest to attention between them."""
    tiny = ZOO["bert"]
    model, batch = tiny.model(), tiny.batch()
    plan = plan_pruning(made_scores(model, {}), model, budget="flops", ratio=0.999, inputs=batch)
    apply_plan(model, plan)
    assert [left_of(group) for group in find_groups(model, ["value_dims"])] == LAYERS * [HEADS * [0]]


@pytest.mark.parametrize("kinds, ratio", [(["value_dims"], 0.2), (DIMS[1:], 0.4), (DIMS[1:], 0.7)])
@pytest.mark.parametrize("comparable", [True, False])
def test_query_key_dimensions_that_are_not_scored_count(kinds, ratio, comparable):
    """They go with their heads, so fewer others do: a head's at most, and eight neurons, beyond the share."""
    dense = ZOO["bert"].model(torch.float32, hidden_size=64, intermediate_size=256)
    scores = made_scores(dense, {0: [1, 2], 1: [0, 2, 3]})
    own = Sensitivity(
        "made", {kind: scores.scores[kind] for kind in kinds}, comparable=comparable, foresees_refit=True
    )
    model = copy.deepcopy(dense)
    apply_plan(model, plan_pruning(own, model, ratio=ratio))
    gone = 1 - count_encoder_parameters(model) / count_encoder_parameters(dense)
    head = (4 * 64 * 16 + 2 * 8 * 64) / count_encoder_parameters(dense)
    assert ratio <= gone <= ratio + (1 if comparable else 2) * head
    assert any(0 in left_of(group) for group in find_groups(model, ["query_key_dims"]))


def test_heads_that_stay_save_nothing():
    """Floors keep a head or more of every layer, and attention between projections works with it."""
    tiny = ZOO["llama"]
    model, batch = tiny.model(), tiny.batch()
    dense = count_encoder_flops(model, batch)
    scores = made_scores(model, {})
    scores.foresees_refit = False
    settings = {"budget": "flops", "inputs": batch, "even_heads": False, "min_neurons": 0.5}
    with pytest.raises(ValueError, match=r"at least 8 value_dims .* so at most 0\.\d+ can go") as refused:
        plan_pruning(scores, model, ratio=0.38, **settings)
    most = float(re.search(r"at most (0\.\d+)", str(refused.value))[1])
    apply_plan(model, plan_pruning(scores, model, ratio=most, **settings))
    assert count_encoder_flops(model, batch) <= (1 - most) * dense


def count_encoder_flops(model, batch):
    """FLOPs of the layers."""
    counts = count_flops_by_module(model, batch)
    return sum(counts.get(layer, 0) for layer in layers(model))


def test_plans_that_leave_useless_dimensions_are_refused(tmp_path):
    model = ZOO["bert"].model()
    size = model.config.hidden_size // HEADS
    value = {0: range(size, 2 * size)}
    with pytest.raises(ValueError, match=r"leaves heads \[1\] of layer 0 query_key_dims, but no value_dims"):
        PruningPlan.for_model(model, value_dims=value)
    plan = PruningPlan.for_model(model, value_dims=value, query_key_dims=value)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
