"""Latency tables: planning with one, and measuring one."""

import copy
import dataclasses
import itertools
import json
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from convnets import costs_in_layers
from own_convnet import NETS, own_entry
from seq2seq import HEADS, SEQ2SEQ
from tiny import hand_made, make_batch, make_model, random_scores
from transformers import SwinConfig, SwinForImageClassification
from zoo import ZOO

from hap_transformers import LatencyTable, apply_plan, plan_pruning, prune_heads
from hap_transformers.components.groups import KINDS, find_groups
from hap_transformers.planning.kinds import kinds_to_prune
from hap_transformers.planning.settings import PlanningSettings


module = sys.modules["hap_transformers.planning.latency_table"]
measuring = sys.modules["hap_transformers.planning.latency_measuring"]

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
    model = make_model().train()
    before = copy.deepcopy(model.state_dict())
    table = LatencyTable.measure(model, make_batch(), points=3, repeats=3, progress=False)
    assert table.counts == {"heads": [0, 1, 2, 3, 4], "neurons": [0, 1, 8, 16, 24]}
    assert table.seconds["heads"][0] == table.seconds["neurons"][0] == 0
    assert table.outside > 0 and all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert (table.mode, table.precision) == ("eager", "float64") and table.device.startswith("cpu (")
    assert all(module.training for module in model.modules())
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    counts = {**table.counts, "heads": [0, 4, 2, 3, 1]}
    times = [{"seconds": {**table.seconds, "heads": [0, 1, 2, 3, last]}} for last in (math.nan, math.inf, "4")]
    times += [{"outside": -1.0}, {"outside": math.nan}, {"outside": "1"}]
    for changes in ({"counts": counts}, {"mode": "fast"}, {"mode": None}, *times):
        (tmp_path / "table.json").write_text(json.dumps({**dataclasses.asdict(table), **changes}))
        with pytest.raises(ValueError, match="is not a latency table"):
            LatencyTable.load(tmp_path / "table.json")
    prune_heads(model, {0: [1]})
    with pytest.raises(ValueError, match="has lost components. Measure the dense"):
        LatencyTable.measure(model, make_batch(), progress=False)
    with pytest.raises(ValueError, match="`repeats` must be"):
        LatencyTable.measure(make_model(), make_batch(), repeats=0, progress=False)


def test_a_table_of_another_mode_is_refused(tmp_path):
    model, old = make_model(), dataclasses.asdict(TABLE)
    for name in ("mode", "precision", "device"):  # Tables had none of these.
        del old[name]
    (tmp_path / "table.json").write_text(json.dumps(old))
    table = LatencyTable.load(tmp_path / "table.json")
    assert table == TABLE and table.mode == "eager"
    plan_pruning(random_scores(model), model, budget="latency", latency_table=table)
    for budget in ("latency", "params"):
        with pytest.raises(ValueError, match="measured in mode 'eager', but latency_mode is 'compiled'"):
            plan_pruning(random_scores(model), model, budget=budget, latency_table=table, latency_mode="compiled")


def seconds_of(kind: str, count: int) -> float:
    """Every block has a fixed cost. Neurons cost the same up to the next multiple of 8."""
    return 0.0 if count == 0 else 0.5 + count / 4 if kind == "heads" else 2.0 + math.ceil(count / 8)


def test_a_table_has_the_fixed_costs_and_the_steps(monkeypatch):
    """The clock is a formula, in seconds that grow with every round; only the shares of the dense model count."""
    model, drift = make_model(), itertools.count(1)

    def forward(model):
        return 1.5 + sum(seconds_of(group.kind.name, group.num_components) for group in find_groups(model))

    def take_turns(passes, repeats):
        speeds = [next(drift) for _ in range(repeats)]
        return {name: [speed * seconds for speed in speeds] for name, seconds in passes.items()}

    monkeypatch.setattr(module, "forward_pass", lambda model, *args: forward(model))
    monkeypatch.setattr(module, "take_turns", take_turns)
    table = LatencyTable.measure(model, make_batch(), points=3, repeats=5)
    speed = np.median(range(1, next(drift)))
    assert table.outside == pytest.approx(1.5 * speed)
    for kind, counts in table.counts.items():
        expected = [speed * seconds_of(kind, count) for count in counts]
        assert table.seconds[kind] == pytest.approx(expected)
        assert table.cost(kind, 1) == pytest.approx(speed * seconds_of(kind, 1))


@pytest.mark.parametrize(
    "name, dense, counts",
    [
        (
            "neurons",
            1536,
            [0, 1, 8, 32, 192, 200, 384, 392, 576, 584, 768, 776, 960, 968, 1152, 1160, 1344, 1352, 1536],
        ),
        ("neurons", 13, [0, 1, 8, 13]),
        ("heads", 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        ("heads", 1, [0, 1]),
    ],
)
def test_counts_to_measure_at(name, dense, counts):
    assert measuring.grid(KINDS[name], dense, 9) == counts


def test_noise_neither_falls_nor_lifts_what_follows():
    assert measuring.rising(np.array([1.0, 2.0, 5.0])).tolist() == [0.0, 1.0, 4.0]
    rising = measuring.rising(np.array([0.0, 1.0, 9.0, 2.0, 3.0, 10.0]))
    assert (np.diff(rising) >= 0).all() and rising[-1] == 10 and rising[1] == 1


def table_of(neurons: dict[int, float], heads: dict[int, float]) -> LatencyTable:
    counts = {"heads": list(heads), "neurons": list(neurons)}
    return dataclasses.replace(
        TABLE, counts=counts, seconds={"heads": [*heads.values()], "neurons": [*neurons.values()]}
    )


def interleaved():
    """Scores by which neurons of the two layers take turns; heads are dear."""
    neurons = torch.arange(1.0, 25.0, dtype=torch.float64)
    heads = [torch.full((4,), 1e6, dtype=torch.float64)] * 2
    return hand_made("kronecker", heads=heads, neurons=[neurons, neurons + 0.1])


def test_whole_blocks_go_where_narrow_ones_would_not_pay():
    table = table_of(neurons={0: 0.0, 1: 10.0, 24: 11.0}, heads={0: 0.0, 4: 0.1})
    settings = {"budget": "latency", "ratio": 0.4, "latency_table": table}
    plan = plan_pruning(interleaved(), make_model(), **settings)
    assert plan.neurons == {0: list(range(24))} and not plan.heads
    unweighed = plan_pruning(interleaved(), make_model(), **settings, weigh_costs=False)
    assert len(unweighed.neurons) == 2


def test_widths_stop_where_the_time_steps_down():
    """The first 8 neurons of a block save most of its time, the next 8 nothing."""
    table = table_of(neurons={0: 0.0, 1: 1.0, 8: 2.0, 16: 2.0, 24: 6.0}, heads={0: 0.0, 4: 0.1})
    plan = plan_pruning(interleaved(), make_model(), budget="latency", ratio=0.6, latency_table=table)
    assert plan.neurons == {0: list(range(8)), 1: list(range(8))} and not plan.heads


@pytest.mark.parametrize("seed", range(8))
def test_no_plan_of_the_same_price_does_less_harm(seed):
    """At any price of a second, the best prefix of every group is found by trying all; plans are those choices."""
    generator = np.random.default_rng(seed)
    model, scores = make_model(), random_scores(make_model(), seed=seed)
    for kind in ("heads", "neurons"):
        scores.scores[kind] = [values.sort().values for values in scores.scores[kind]]
    rises = generator.exponential(size=7) * generator.integers(0, 2, 7)  # Some are 0.
    table = table_of(
        neurons={0: 0.0, 1: 0.5, **dict(zip((8, 16, 24), 0.5 + np.cumsum(rises[:3]), strict=True))},
        heads={0: 0.0, **dict(zip((1, 2, 3, 4), 0.5 + np.cumsum(rises[3:]), strict=True))},
    )
    groups = find_groups(model)
    dense = sum(table.cost(group.kind.name, group.num_components) for group in groups)
    compared = 0
    for price in (0.5, 1.0, 2.0, 4.0):
        harm = saved = 0.0
        for group in groups:
            values, count = scores.scores[group.kind.name][group.layer], group.num_components
            cost = partial(table.cost, group.kind.name)
            prefixes = [
                (float(values[:gone].sum()), cost(count) - cost(count - gone))
                for gone in range(0, count + 1, group.kind.step)
            ]
            best = min(prefixes, key=lambda choice: choice[0] - price * choice[1])
            harm, saved = harm + best[0], saved + best[1]
        if not 0 < saved < dense:
            continue
        plan = plan_pruning(scores, model, budget="latency", ratio=saved / dense, latency_table=table)
        found = sum(
            float(scores.scores[kind][layer][gone].sum())
            for kind, layers in plan.removed.items()
            for layer, gone in layers.items()
        )
        assert found == pytest.approx(harm)
        assert plan.promise["latency"] == pytest.approx(table.outside + dense - saved)
        compared += 1
    assert compared


@pytest.mark.parametrize("name", ["resnet-basic", "resnet-bottleneck", "regnet-y", "own"])
def test_layers_of_several_sizes(monkeypatch, tmp_path, name):
    """The clock counts the products of each convolution and a fixed cost: the table foretells it for any plan."""
    net = NETS[name]
    with own_entry():
        model, batch = net.model(), net.batch()

        def forward(model):
            costs = costs_in_layers(model, net, "flops")
            return (
                100.0 + sum(costs.values()) / 1000 + sum(5.0 for group in find_groups(model) if group.num_components)
            )

        def take_turns(passes, repeats):
            return {name: [seconds] * repeats for name, seconds in passes.items()}

        monkeypatch.setattr(module, "forward_pass", lambda model, *args: forward(model))
        monkeypatch.setattr(module, "take_turns", take_turns)
        table = LatencyTable.measure(model, batch, points=3, repeats=1, progress=False)
        sizes = {chain.components for chain in net.chains}
        assert len(set(table.sets["channels"])) >= len(sizes) and len(table.sets["channels"]) == len(net.chains)
        table.save(tmp_path / "table.json")
        assert LatencyTable.load(tmp_path / "table.json") == table
        before, smaller = forward(model), copy.deepcopy(model)
        fixed = table.outside
        for ratio in (0.3, 0.7):  # The second plan is for a model that was pruned by the first.
            scores = hand_made("kronecker", channels=random_channel_scores(smaller))
            plan = plan_pruning(scores, smaller, budget="latency", ratio=ratio, latency_table=table)
            apply_plan(smaller, plan)
            assert plan.promise["latency"] == pytest.approx(forward(smaller))
            assert plan.promise["latency"] - fixed <= (1 - ratio) * (before - fixed) + 1e-6
        with pytest.raises(ValueError, match="has lost components. Measure the dense model"):
            LatencyTable.measure(smaller, batch, progress=False)
        other = net.model(hidden_sizes=[16, 32]) if name != "own" else make_model()
        with pytest.raises(ValueError, match="Measure this model, dense"):
            table.validate(other, find_groups(other), [group.num_components for group in find_groups(other)])


@pytest.mark.parametrize("name", ["bert", "bart", "bart, other decoder", "t5"])
def test_kinds_that_go_are_those_that_tables_measure(name):
    """Heads of encoder-decoders go whole, also where both parts have equally many: they see other tokens."""
    dense = ZOO["bert"] if name == "bert" else SEQ2SEQ[name[:4]]
    model = dense.model(**({"decoder_attention_heads": HEADS} if name == "bart" else {}))
    batch = dense.batch()
    if "labels" in batch:
        batch["labels"] = batch["labels"][:, :4].contiguous()
    table = LatencyTable.measure(model, batch, points=2, repeats=1, progress=False)
    settings = PlanningSettings(budget="latency")
    kinds = kinds_to_prune(None, "kronecker", settings, model)
    dims = ["query_key_dims", "value_dims"]
    assert set(kinds) == {"neurons", *(dims if name == "bert" else ["heads"])} and bool(table.widths) == (
        name == "bert"
    )
    groups = find_groups(model, kinds)
    table.validate(model, groups, [group.num_components for group in groups])
    if name != "bert":
        with pytest.raises(ValueError, match="They are measured where attention works with these and all layers are"):
            kinds_to_prune(dims, "kronecker", settings, model)


def random_channel_scores(model):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(group.num_components, generator=generator, dtype=torch.float64) for group in find_groups(model)]


def test_heads_go_whole_where_stages_have_several_numbers_of_them():
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2}
    sizes |= {"image_size": 16, "patch_size": 2}
    model = SwinForImageClassification(SwinConfig(**sizes)).double().eval()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16).double()}
    table = LatencyTable.measure(model, batch, points=2, repeats=1, progress=False)
    assert table.sets == {"heads": [0, 1], "neurons": [0, 1]} and not table.widths
    assert [table.counts[name][-1] for name in ("heads/0", "heads/1", "neurons/0", "neurons/1")] == [2, 4, 32, 64]
    kinds = kinds_to_prune(None, "kronecker", PlanningSettings(budget="latency"), model)
    assert kinds == ("heads", "neurons")
    generator = torch.Generator().manual_seed(0)
    scores = {
        kind: [torch.rand(g.num_components, generator=generator).double() for g in find_groups(model, [kind])]
        for kind in kinds
    }
    plan = plan_pruning(hand_made("kronecker", **scores), model, budget="latency", ratio=0.3, latency_table=table)
    apply_plan(model, plan)
    left = sum(table.cost(g.kind.name, g.num_components, layer=g.layer) for g in find_groups(model))
    assert plan.promise["latency"] == pytest.approx(table.outside + left)
