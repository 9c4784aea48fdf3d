"""Implants against the low-rank map written out, in every architecture, in other processes' eyes and in regression."""

import copy

import pytest
import torch
from conftest import make_model
from test_reconstruction import make_batches
from transformers import AutoModelForSequenceClassification
from zoo import NEURONS, ZOO

from hap_transformers import (
    HapConfig,
    PruningPlan,
    Sensitivity,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
)
from hap_transformers.components.groups import attention_blocks, feed_forward_blocks
from hap_transformers.sensitivity.scores import COMPARABLE_METHODS
from hap_transformers.surgery.implants import reduced_rank_regression


REMOVED, RANK = [1, 5, 6, 9], 3


def implanted(model, rank=RANK):
    smaller = copy.deepcopy(model)
    apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: REMOVED}, implants={0: rank}))
    return smaller


def randomize(block):
    """Gives the implant some map B A x + B b, and returns it."""
    *gates, linear = block.inputs
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        A = linear.matrix(linear.module.weight)[-RANK:]
        A.copy_(torch.randn(A.shape, generator=generator, dtype=A.dtype))
        B = block.output.matrix(block.output.module.weight)[:, -RANK:]
        B.copy_(torch.randn(B.shape, generator=generator, dtype=B.dtype))
        for gate in gates:  # What stands there must not matter.
            gate.matrix(gate.module.weight)[-RANK:] = 7.0
    return A.detach().clone(), B.detach().clone()


def test_is_a_low_rank_map_beside_the_kept_neurons(model_type):
    tiny = ZOO[model_type]
    model, batch = tiny.model(), tiny.batch()
    masked = copy.deepcopy(model)
    block = feed_forward_blocks(masked)[0]
    block.output.matrix(block.output.module.weight.data)[:, REMOVED] = 0
    smaller = implanted(model)
    with torch.no_grad():
        torch.testing.assert_close(smaller(**batch).logits, masked(**batch).logits, rtol=0, atol=1e-10)
        A, B = randomize(feed_forward_blocks(smaller)[0])
        read = []
        block.inputs[-1].module.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        block.output.module.register_forward_hook(lambda module, args, out: out + read[-1] @ A.T @ B.T)
        expected = masked(**batch).logits
        torch.testing.assert_close(smaller(**batch).logits, expected, rtol=0, atol=1e-10)
        assert (expected - model(**batch).logits).abs().max() > 1e-3
    smaller.train()
    smaller(**batch).logits.sum().backward()
    own = feed_forward_blocks(smaller)[0]
    assert own.output.matrix(own.output.module.weight.grad)[:, -RANK:].abs().max() > 0


def test_reloads(model_type, tmp_path):
    tiny = ZOO[model_type]
    smaller = implanted(tiny.model())
    randomize(feed_forward_blocks(smaller)[0])
    smaller.save_pretrained(tmp_path)
    reloaded = type(smaller).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert [block.implant_rank for block in feed_forward_blocks(reloaded)] == [RANK, 0][
        : len(feed_forward_blocks(reloaded))
    ]
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
    """Linear neurons are neurons: some go, and the rank is that of those left."""
    smaller = implanted(make_model())
    batch = ZOO["bert"].batch()
    randomize(feed_forward_blocks(smaller)[0])
    last = NEURONS - len(REMOVED) + RANK - 1
    masked = copy.deepcopy(smaller)
    block = feed_forward_blocks(masked)[0]
    block.output.matrix(block.output.module.weight.data)[:, [0, last]] = 0
    apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: [0, last]}))
    assert feed_forward_blocks(smaller)[0].implant_rank == RANK - 1
    assert smaller.config.quantization_config["implants"] == {"0": RANK - 1}
    torch.testing.assert_close(smaller(**batch).logits, masked(**batch).logits, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="has an implant of rank 2 already"):
        apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: [0]}, implants={0: 1}))
    apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: range(last - 1)}))
    assert "implants" not in smaller.config.quantization_config


def test_reduced_rank_regression_is_the_svd_solution():
    """Against numpy's SVD of the fitted values: the best approximation of some rank of what X leaves."""
    generator = torch.Generator().manual_seed(0)
    X, Z, Y = (torch.randn(60, n, generator=generator, dtype=torch.float64) for n in (4, 6, 5))
    F = torch.cat([X, Z], 1)
    for rank in (1, 2, 4):
        A = reduced_rank_regression(F.T @ F, F.T @ Y, rank, 4, ridge=0.0)
        features = torch.cat([X, Z @ A.T], 1)
        left = Y - features @ torch.linalg.lstsq(features, Y).solution
        projector = X @ torch.linalg.pinv(X)
        z, y = Z - projector @ Z, Y - projector @ Y
        fitted = z @ torch.linalg.lstsq(z, y).solution
        values = torch.linalg.svdvals(fitted)
        expected = (y - fitted).square().sum() + values[rank:].square().sum()
        assert left.square().sum().item() == pytest.approx(expected.item(), rel=1e-9)
        variances = (Z @ A.T).square().sum(0)
        torch.testing.assert_close(variances, (X**2).sum(0).mean().expand(rank))


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_a_linear_loss_is_made_good(model_type):
    """Biases of 30 leave the removed neurons' activations linear, of the implant's rank: nothing is lost."""
    tiny = ZOO[model_type]
    dense, batches = tiny.model(), make_batches(tiny)
    (projection,) = feed_forward_blocks(dense)[0].inputs
    with torch.no_grad():
        projection.module.bias[REMOVED] = 30
        weight = projection.matrix(projection.module.weight)
        weight[REMOVED[1]] = weight[REMOVED[0]]
        output = feed_forward_blocks(dense)[0].output
        output.matrix(output.module.weight)[:, 10:] = 0  # Few neurons are left that could stand in for the map.
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
    sensitivity = Sensitivity(
        COMPARABLE_METHODS[0],
        [torch.full((block.num_components,), 1e9).double() for block in attention_blocks(model)],
        [torch.arange(NEURONS).double(), 100 + torch.arange(NEURONS).double()],
    )
    plain = plan_pruning(sensitivity, model, ratio=0.3, neuron_multiple=1)
    plan = plan_pruning(sensitivity, model, ratio=0.3, neuron_multiple=1, implant_ratio=0.25)
    (rank,) = plan.implants.values()
    assert rank > 0 and plan.promise["parameters"] <= plain.promise["parameters"]
    assert sum(map(len, plan.neurons.values())) == sum(map(len, plain.neurons.values())) + rank
    apply_plan(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.promise["parameters"]


def test_beside_a_layer_without_heads():
    """An implant is the feed-forward block's alone; nothing is half done where attention has gone before."""
    model = make_model()
    apply_plan(model, PruningPlan.for_model(model, heads={1: [0, 1, 2, 3]}))
    apply_plan(model, PruningPlan.for_model(model, heads={0: [0]}, neurons={1: range(16)}, implants={1: 8}))
    assert [block.num_components for block in attention_blocks(model)] == [3, 0]
    assert [block.implant_rank for block in feed_forward_blocks(model)] == [0, 8]


def test_only_the_implants_asked_for_are_initialised_anew():
    dense, batches = make_model(), make_batches(ZOO["bert"])
    smaller = copy.deepcopy(dense)
    plan = {"neurons": {0: range(8), 1: range(8)}, "implants": {0: 8, 1: 4}}  # As many ranks as neurons go, too.
    apply_plan(smaller, PruningPlan.for_model(smaller, **plan))
    before = [block.inputs[0].module.weight.clone() for block in feed_forward_blocks(smaller)]
    smaller.bert.encoder.layer[0].intermediate.dense.bias.data[-8:] = 1
    reconstruct(smaller, dense, batches, init_implants=[0], progress=False)
    first, second = feed_forward_blocks(smaller)
    assert not torch.equal(first.inputs[0].module.weight[-8:], before[0][-8:])
    assert first.output.module.weight[:, -8:].abs().max() > 0 and not first.inputs[0].module.bias[-8:].any()
    assert torch.equal(second.inputs[0].module.weight, before[1])


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
    head = attention_blocks(make_model())[0].weights_per_component()
    assert ratio <= 1 - left / before <= ratio + max(head, 8 * 33) / before


@pytest.mark.parametrize("settings", [{"refit": False}, {"implant_init": "zero"}], ids=str)
def test_regression_goes_with_the_refit(settings):
    with pytest.raises(ValueError, match="part of the refit"):
        HapConfig(implant_ratio=0.1, **settings)
