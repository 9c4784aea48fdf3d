"""Latency tables: planning with one, and measuring one."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import make_batch, make_model, random_scores

from hap_transformers import LatencyTable, apply_plan, plan_pruning, prune_heads
from hap_transformers.components.groups import find_groups


TABLE = LatencyTable(
    "bert",
    counts={"heads": [0, 2, 4], "neurons": [0, 24]},
    seconds={"heads": [0.0, 3.0, 4.0], "neurons": [0.0, 12.0]},
    outside=1.0,
    batch={"input_ids": [1, 8]},
)


def test_latency_follows_the_table():
    model = make_model()
    sensitivity = random_scores(model)
    plan = plan_pruning(sensitivity, model, budget="latency", ratio=0.5, latency_table=TABLE, neuron_multiple=1)
    apply_plan(model, plan)
    heads = [group.num_components for group in find_groups(model, ["heads"])]
    neurons = [group.num_components for group in find_groups(model, ["neurons"])]
    expected = sum(np.interp(heads, [0, 2, 4], [0, 3, 4])) + sum(neurons) / 2
    assert plan.promise["latency"] == pytest.approx(expected + 1)
    assert 0.5 * 32 - 2 <= expected <= 0.5 * 32
    assert not plan_pruning(random_scores(model), model, budget="latency", ratio=0.5, latency_table=TABLE).heads


@pytest.mark.parametrize("budget", ["latency", "params"])
def test_a_table_of_another_model_is_refused(budget):
    """The plan need not meet a latency; promising one is enough."""
    model = make_model()
    table = dataclasses.replace(TABLE, counts={**TABLE.counts, "heads": [0, 2, 8]})
    with pytest.raises(ValueError, match="Measure this model, dense"):
        plan_pruning(random_scores(model), model, budget=budget, latency_table=table)


def test_measured_table(tmp_path):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    table = LatencyTable.measure(model, make_batch(), points=3, repeats=3, progress=False)
    assert table.counts == {"heads": [0, 2, 4], "neurons": [0, 12, 24]}
    assert table.seconds["heads"][0] == table.seconds["neurons"][0] == 0
    assert table.outside >= 0 and all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    counts = {**table.counts, "heads": [0, 4, 2]}
    (tmp_path / "table.json").write_text(json.dumps({**dataclasses.asdict(table), "counts": counts}))
    with pytest.raises(ValueError, match="is not a latency table"):
        LatencyTable.load(tmp_path / "table.json")
    prune_heads(model, {0: [1]})
    with pytest.raises(ValueError, match="layers are alike"):
        LatencyTable.measure(model, make_batch(), progress=False)
