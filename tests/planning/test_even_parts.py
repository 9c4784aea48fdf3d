"""Layers whose heads lose dimensions keep equally many of all heads that are left."""

import copy
import functools

import numpy as np
import pytest
import torch
from dims import left_of
from tiny import DIMENSIONS, WHOLE_HEADS, make_batch, make_model
from zoo import HEADS, LAYERS, ZOO

from hap_transformers import (
    LatencyTable,
    PlanningSettings,
    PruningPlan,
    Sensitivity,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
)
from hap_transformers.components.groups import find_groups
from hap_transformers.efficiency import count_encoder_parameters, count_flops
from hap_transformers.planning.kinds import kinds_to_prune
from hap_transformers.planning.latency_measuring import of_whole_parts


SIZE = 16


def wide_model():
    """A BERT whose heads have 16 dimensions; the finest step is a quarter of them."""
    return make_model(hidden_size=HEADS * SIZE, intermediate_size=64)


def planted(model, kept):
    """Scores by which every layer's heads shall keep some of their first dimensions, and nothing else goes as cheaply.

    Args:
        model (`PreTrainedModel`): The model.
        kept (`dict[int, list[int]]`): By layer, what every head keeps.
    """
    scores = {"neurons": [torch.full((g.num_components,), 100.0) for g in find_groups(model, ["neurons"])]}
    for kind in DIMENSIONS[:2]:
        scores[kind] = []
        for layer in range(LAYERS):
            dear = torch.arange(SIZE) < torch.tensor(kept[layer])[:, None]
            scores[kind].append((1e-3 + 10.0 * dear).flatten().double())
    scores["neurons"] = [values.double() for values in scores["neurons"]]
    return Sensitivity("made", scores=scores, comparable=True, foresees_refit=True)


def left(model):
    """By kind and layer, the dimensions that every head has left."""
    return {kind: [left_of(group) for group in find_groups(model, [kind])] for kind in DIMENSIONS[:2]}


@pytest.mark.parametrize("budget", ["params", "flops"])
def test_what_is_planted_goes(budget):
    """Heads that shall go are gone, and all others of their layer keep what the widest shall keep."""
    model, batch = wide_model(), make_batch(3)
    expected = {0: [8, 0, 8, 8], 1: [12, 12, 12, 0]}
    dense = count_encoder_parameters(model) if budget == "params" else count_flops(copy.deepcopy(model), batch)
    target = copy.deepcopy(model)
    gone = {
        layer: [head * SIZE + dim for head, count in enumerate(heads) for dim in range(count, SIZE)]
        for layer, heads in expected.items()
    }
    apply_plan(target, PruningPlan.for_model(target, query_key_dims=gone, value_dims=gone))
    cost = count_encoder_parameters(target) if budget == "params" else count_flops(target, batch)
    # FLOPs of what is around the encoder count for nothing.
    share = (dense - cost) / (dense if budget == "params" else _flops_of_layers(model, batch))
    plan = plan_pruning(planted(model, expected), model, budget=budget, ratio=share - 1e-6, inputs=batch)
    apply_plan(model, plan)
    assert left(model) == {kind: [expected[0], expected[1]] for kind in DIMENSIONS[:2]}
    assert plan.promise["flops"] == count_flops(model, batch)


def _flops_of_layers(model, batch):
    inner = copy.deepcopy(model)
    inner.bert.encoder.layer = inner.bert.encoder.layer[:0]
    return count_flops(model, batch) - count_flops(inner, batch)


@functools.cache
def scores_of(model_type):
    tiny = ZOO[model_type]
    batch = {**tiny.batch(4), "labels": torch.arange(4) % 2}
    return estimate_sensitivity(tiny.model(), [batch], components=DIMENSIONS, progress=False)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("budget", ["params", "flops"])
@pytest.mark.parametrize("model_type", ["albert", "bert", "deberta-v2", "distilbert", "gpt2", "mpnet", "t5", "vit"])
def test_heads_are_even_and_promises_kept(model_type, budget, ratio):
    tiny = ZOO[model_type]
    model, batch = tiny.model(), tiny.batch(4)
    settings = {"budget": budget, "ratio": ratio, "inputs": batch, "neuron_multiple": 1}
    plan = plan_pruning(scores_of(model_type), model, **settings)
    before = count_encoder_parameters(model)
    apply_plan(model, plan)
    narrows = find_groups(model, ["value_dims"])[0].runs.narrows
    for value, query_key in zip(*left(model).values(), strict=True):
        if narrows:
            assert value == query_key and len(set(value) - {0}) <= 1
    assert narrows or model_type == "gpt2"  # By Transformers 4, its queries have no scale of their own.
    assert plan.promise["flops"] == count_flops(model, batch)
    if budget == "params":
        assert count_encoder_parameters(model) <= (1 - ratio) * before


def test_even_heads_are_ordinary_narrow_ones():
    """Nothing is spread or gathered, and attention works with the narrow size."""
    model = wide_model()
    scores = planted(model, {layer: [8] * HEADS for layer in range(LAYERS)})
    apply_plan(model, plan_pruning(scores, model, ratio=0.3))
    dense = {type(module) for module in wide_model().modules()}
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        assert attention.attention_head_size == 8 and attention.query.out_features == 8 * HEADS
        projections = [attention.query, attention.key, attention.value, layer.attention.output.dense]
        if "scaling" in vars(attention):
            assert {type(projection) for projection in projections} <= dense


def test_uneven_heads_on_demand():
    model = wide_model()
    kept = {0: [12, 4, 1, 7], 1: [2, 16, 0, 9]}
    scores = planted(model, kept)
    share = 1 - sum(map(sum, kept.values())) / (LAYERS * HEADS * SIZE)
    attention = sum(g.num_components * g.parameters_per_component() for g in find_groups(model, DIMENSIONS[:2]))
    ratio = share * attention / count_encoder_parameters(model)
    plan = plan_pruning(scores, model, ratio=ratio - 0.005, even_heads=False)
    apply_plan(model, plan)
    assert all(len(set(heads)) > 2 for heads in left(model)["value_dims"])


def test_what_need_not_go_stays():
    """The budget is met without any unit that it can be met without."""
    model = wide_model()
    scores = planted(model, {layer: [8] * HEADS for layer in range(LAYERS)})
    for kind in DIMENSIONS[:2]:
        scores.scores[kind] = [3 * values + 4 for values in scores.scores[kind]]
    # Some neurons are cheaper than dimensions and some dearer.
    scores.scores["neurons"] = [torch.linspace(1, 15, 64).double() for _ in range(LAYERS)]
    dense = count_encoder_parameters(model)
    neuron = find_groups(model, ["neurons"])[0].parameters_per_component()
    for ratio in torch.linspace(0.1, 0.7, 25).tolist():
        smaller = copy.deepcopy(model)
        apply_plan(smaller, plan_pruning(scores, smaller, ratio=ratio, neuron_multiple=1))
        spare = (1 - ratio) * dense - count_encoder_parameters(smaller)
        neurons_gone = any(group.num_components < 64 for group in find_groups(smaller, ["neurons"]))
        assert 0 <= spare and (spare < neuron or not neurons_gone)


@pytest.mark.parametrize("model_type", sorted(ZOO))
def test_default_kinds_are_of_what_gets_faster(model_type):
    """With rotary embeddings attention keeps its width, so heads go whole."""
    model = ZOO[model_type].model(torch.float32)
    settings = PlanningSettings()
    expected = DIMENSIONS if find_groups(model, ["value_dims"])[0].runs.narrows else WHOLE_HEADS
    assert list(kinds_to_prune(None, "kronecker", settings, model)) == expected
    if model_type in ("llama", "mistral", "modernbert", "qwen2", "qwen3"):
        assert expected == WHOLE_HEADS


def made_table(widths=(4, 8, SIZE), shares=(0.4, 0.5, 1.0)):
    """Heads take a second each and have widths, neurons take a hundredth."""
    return LatencyTable(
        "bert",
        counts={"heads": [0, HEADS], "neurons": [0, 64]},
        seconds={"heads": [0.0, float(HEADS)], "neurons": [0.0, 0.64]},
        outside=1.0,
        batch={"input_ids": [1, 8]},
        widths={"heads": list(widths)},
        shares={"heads": list(shares)},
    )


def test_latency_of_narrow_heads():
    """Widths between those of the table are interpolated; the promise is the table's."""
    model = wide_model()
    scores = planted(model, {0: [8, 0, 8, 8], 1: [12, 12, 12, 0]})
    seconds = 3 * 0.5 + 3 * 0.75 + 2 * 0.64
    plan = plan_pruning(
        scores, model, budget="latency", ratio=1 - seconds / (8 + 1.28) - 1e-6, latency_table=made_table()
    )
    apply_plan(model, plan)
    assert left(model)["value_dims"] == left(model)["query_key_dims"] == [[8, 0, 8, 8], [12, 12, 12, 0]]
    assert plan.promise["latency"] == pytest.approx(1 + seconds)


def test_heads_that_take_as_long_when_narrower_go_whole():
    model = wide_model()
    scores = planted(model, {layer: [12, 12, 4, 4] for layer in range(LAYERS)})
    table = made_table(shares=(1.0, 1.0, 1.0))
    apply_plan(model, plan_pruning(scores, model, budget="latency", ratio=0.4, latency_table=table))
    assert all(set(heads) <= {0, SIZE} for heads in left(model)["value_dims"])


def test_a_table_that_knows_no_widths_is_refused():
    model = wide_model()
    scores = planted(model, {layer: [8] * HEADS for layer in range(LAYERS)})
    for table in (made_table((), ()), made_table((2, 4), (0.5, 1.0))):
        table.widths = {name: widths for name, widths in table.widths.items() if widths}
        with pytest.raises(ValueError, match="does not know heads with fewer than 16 dimensions. Measure it again"):
            plan_pruning(scores, model, ratio=0.4, latency_table=table)


def test_the_widest_head_takes_its_whole_share_whatever_the_noise():
    """Rounding makes it no less than 1: a head of full width costs what the table measured."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        passes = generator.uniform(0.2, 1.0, 4).tolist()
        _, shares = of_whole_parts(["value_dims"], [4, 8, 12, 16], passes, {"heads": [0.3, 1.0]})
        assert shares["heads"][-1] == 1
    halves = {"heads/0": [0.3, 0.6], "neurons": [0.1, 0.3], "heads/1": [0.6, 1.0]}
    assert of_whole_parts(["value_dims"], [8, 16], [0.65, 1.0], halves)[1]["heads"] == pytest.approx([0.5, 1.0])


def test_measured_widths(tmp_path):
    model = wide_model()
    table = LatencyTable.measure(model, make_batch(), points=2, repeats=2, progress=False)
    assert table.widths == {"heads": [4, 8, 12, 16]} and table.shares["heads"][-1] == 1
    assert sorted(table.shares["heads"]) == table.shares["heads"] and table.shares["heads"][0] >= 0
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    rotary = ZOO["llama"].model(torch.float32)
    assert not LatencyTable.measure(rotary, ZOO["llama"].batch(), points=2, repeats=1, progress=False).widths
