"""Implants equal an explicit low-rank map in every architecture, reload, and are refitted."""

import copy

import pytest
import torch
from tiny import hand_made, make_batches, make_model
from transformers import AutoModelForSequenceClassification
from zoo import HEADS, LAYERS, NEURONS, ZOO

from hap_transformers import (
    HapConfig,
    PruningPlan,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
)
from hap_transformers.components.groups import find_groups


REMOVED, RANK = [1, 5, 6, 9], 3


def implanted(model, rank=RANK):
    smaller = copy.deepcopy(model)
    apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: REMOVED}, implants={0: rank}))
    return smaller


def randomize(group):
    """Gives the implant a random map B A x, and returns A and B."""
    *gates, linear = group.writers
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        A = linear.matrix(linear.module.weight)[-RANK:]
        A.copy_(torch.randn(A.shape, generator=generator, dtype=A.dtype))
        B = group.reader.matrix(group.reader.module.weight)[:, -RANK:]
        B.copy_(torch.randn(B.shape, generator=generator, dtype=B.dtype))
        for gate in gates:  # The gates' values must not matter.
            gate.matrix(gate.module.weight)[-RANK:] = 7.0
    return A.detach().clone(), B.detach().clone()


def test_is_a_low_rank_map_beside_the_kept_neurons(model_type):
    tiny = ZOO[model_type]
    model, batch = tiny.model(), tiny.batch()
    masked = copy.deepcopy(model)
    group = find_groups(masked, ["neurons"])[0]
    group.reader.matrix(group.reader.module.weight.data)[:, REMOVED] = 0
    smaller = implanted(model)
    with torch.no_grad():
        torch.testing.assert_close(smaller(**batch).logits, masked(**batch).logits, rtol=0, atol=1e-10)
        A, B = randomize(find_groups(smaller, ["neurons"])[0])
        read = []
        group.writers[-1].module.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        group.reader.module.register_forward_hook(lambda module, args, out: out + read[-1] @ A.T @ B.T)
        expected = masked(**batch).logits
        torch.testing.assert_close(smaller(**batch).logits, expected, rtol=0, atol=1e-10)
        assert (expected - model(**batch).logits).abs().max() > 1e-3
    smaller.train()
    smaller(**batch).logits.sum().backward()
    reader = find_groups(smaller, ["neurons"])[0].reader
    assert reader.matrix(reader.module.weight.grad)[:, -RANK:].abs().max() > 0


def test_reloads(model_type, tmp_path):
    tiny = ZOO[model_type]
    smaller = implanted(tiny.model())
    randomize(find_groups(smaller, ["neurons"])[0])
    smaller.save_pretrained(tmp_path)
    reloaded = type(smaller).from_pretrained(tmp_path, dtype=torch.float64).eval()
    first, *others = [group.implant_rank for group in find_groups(reloaded, ["neurons"])]
    assert first == RANK and not any(others)
    batch = tiny.batch()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**batch).logits, smaller(**batch).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("record", [{"0": 0}, {"0": 99}, {"7": 1}, {"0": True}, [1], {"1": 1}], ids=str)
def test_a_wrong_record_is_refused(tmp_path, record):
    smaller = implanted(make_model())
    smaller.config.quantization_config["implants"] = record
    smaller.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="implant"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_pruned_further():
    """Linear neurons can be removed like others; the rank counts those that are left."""
    smaller = implanted(make_model())
    batch = ZOO["bert"].batch()
    randomize(find_groups(smaller, ["neurons"])[0])
    last = NEURONS - len(REMOVED) + RANK - 1
    masked = copy.deepcopy(smaller)
    group = find_groups(masked, ["neurons"])[0]
    group.reader.matrix(group.reader.module.weight.data)[:, [0, last]] = 0
    apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: [0, last]}))
    assert find_groups(smaller, ["neurons"])[0].implant_rank == RANK - 1
    assert smaller.config.quantization_config["implants"] == {"0": RANK - 1}
    torch.testing.assert_close(smaller(**batch).logits, masked(**batch).logits, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="has an implant of rank 2 already"):
        apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: [0]}, implants={0: 1}))
    apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: range(last - 1)}))
    assert "implants" not in smaller.config.quantization_config


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_a_linear_loss_is_made_good(model_type):
    """Biases of 30 make the removed neurons linear, with the implant's rank, so nothing is lost."""
    tiny = ZOO[model_type]
    dense, batches = tiny.model(), make_batches(tiny)
    (projection,) = find_groups(dense, ["neurons"])[0].writers
    with torch.no_grad():
        projection.module.bias[REMOVED] = 30
        weight = projection.matrix(projection.module.weight)
        weight[REMOVED[1]] = weight[REMOVED[0]]
        reader = find_groups(dense, ["neurons"])[0].reader
        reader.matrix(reader.module.weight)[:, 10:] = 0  # Few neurons are left that could replace the map.
    expected = dense(**batches[0]).logits
    smaller = copy.deepcopy(dense)
    removed = [*REMOVED, *range(10, NEURONS)]
    apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: removed}, implants={0: RANK}))
    assert (smaller(**batches[0]).logits - expected).abs().max() > 1e-3
    without = copy.deepcopy(smaller)
    reconstruct(without, dense, batches, ridge=1e-12, progress=False)
    assert (without(**batches[0]).logits - expected).abs().max() > 5e-6
    reconstruct(smaller, dense, batches, ridge=1e-12, init_implants=[0], progress=False)
    torch.testing.assert_close(smaller(**batches[0]).logits, expected, rtol=0, atol=1e-7)


def test_plans_pay_for_implants():
    model = make_model()
    sensitivity = hand_made(
        "kronecker",
        heads=[torch.full((HEADS,), 1e9).double()] * LAYERS,
        neurons=[torch.arange(NEURONS).double(), 100 + torch.arange(NEURONS).double()],
    )
    plain = plan_pruning(sensitivity, model, ratio=0.3, neuron_multiple=1)
    plan = plan_pruning(sensitivity, model, ratio=0.3, neuron_multiple=1, implant_ratio=0.25)
    (rank,) = plan.implants.values()
    assert rank > 0 and plan.promise["parameters"] <= plain.promise["parameters"]
    assert sum(map(len, plan.neurons.values())) == sum(map(len, plain.neurons.values())) + rank
    apply_plan(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.promise["parameters"]


def test_beside_a_layer_without_heads():
    """An implant concerns the feed-forward block alone, even if the layer has no attention."""
    model = make_model()
    apply_plan(model, PruningPlan.for_model(model, heads={1: [0, 1, 2, 3]}))
    apply_plan(model, PruningPlan.for_model(model, heads={0: [0]}, neurons={1: range(16)}, implants={1: 8}))
    assert [group.num_components for group in find_groups(model, ["heads"])] == [3, 0]
    assert [group.implant_rank for group in find_groups(model, ["neurons"])] == [0, 8]


def test_only_the_implants_asked_for_are_initialised_anew():
    dense, batches = make_model(), make_batches(ZOO["bert"])
    smaller = copy.deepcopy(dense)
    plan = {
        "neurons": {0: range(8), 1: range(8)},
        "implants": {0: 8, 1: 4},
    }  # The first layer gets as many ranks as it loses neurons.
    apply_plan(smaller, PruningPlan.for_model(smaller, **plan))
    before = [group.writers[0].module.weight.clone() for group in find_groups(smaller, ["neurons"])]
    smaller.bert.encoder.layer[0].intermediate.dense.bias.data[-8:] = 1
    reconstruct(smaller, dense, batches, init_implants=[0], progress=False)
    first, second = find_groups(smaller, ["neurons"])
    assert not torch.equal(first.writers[0].module.weight[-8:], before[0][-8:])
    assert first.reader.module.weight[:, -8:].abs().max() > 0 and not first.writers[0].module.bias[-8:].any()
    # The second is fitted to what its block reads now, which is nearly what it read before.
    rows = second.writers[0].module.weight[-4:]
    assert 0 < (rows - before[1][-4:]).norm() < 0.1 * rows.norm()


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.8, 0.95])
@pytest.mark.parametrize("multiple, neurons", [(8, 36), (1, 24)])
def test_budgets_hold_with_implants(ratio, multiple, neurons):
    model = make_model(intermediate_size=neurons)
    batches = [ZOO["bert"].batch(8)]
    batches[0]["labels"] = torch.arange(8) % 2
    sensitivity = estimate_sensitivity(model, batches, progress=False)
    before = sum(p.numel() for p in model.bert.encoder.parameters())
    plan = plan_pruning(sensitivity, model, ratio=ratio, neuron_multiple=multiple, implant_ratio=0.3)
    apply_plan(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.promise["parameters"]
    left = sum(p.numel() for p in model.bert.encoder.parameters())
    head = find_groups(make_model(), ["heads"])[0].weights_per_component()
    assert ratio <= 1 - left / before <= ratio + max(head, 8 * 33) / before


@pytest.mark.parametrize("settings", [{"refit": False}, {"implant_init": "zero"}], ids=str)
def test_regression_goes_with_the_refit(settings):
    with pytest.raises(ValueError, match="'regression' requires refit=True; 'zero' requires refit=False"):
        HapConfig(implant_ratio=0.1, **settings)
