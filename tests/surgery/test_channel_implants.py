"""Implants of channels: 1x1 filters in the place of larger ones, against masked dense models in float64."""

import copy

import numpy as np
import pytest
import torch
from convnets import CONVNETS, REPLACED, all_components, costs_in_layers, masked, masks_without, with_implants
from own_convnet import OWN, own_entry
from peft import LoraConfig, get_peft_model
from tiny import hand_made

from hap_transformers import (
    HapConfig,
    PruningPlan,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
    tune_layers,
)
from hap_transformers.components.groups import find_groups
from hap_transformers.efficiency import count_flops, count_parameters
from hap_transformers.surgery.undo import undone_on_error


pytestmark = [pytest.mark.any_release, pytest.mark.usefixtures("known")]
# Convolutions with biases and dilation, and a depthwise one between; nothing is known of norms there.
CASES = {**REPLACED, "own": ({0: [0, 2, 5], 1: [4], 2: [1, 3]}, {0: [2, 5], 2: [3]})}
NETS = {**{name: CONVNETS[name] for name in REPLACED}, "own": OWN}
BASIC, BOTTLENECK = CONVNETS["resnet-basic"], CONVNETS["resnet-bottleneck"]


@pytest.fixture(scope="module")
def known():
    with own_entry():
        yield


@pytest.fixture(params=CASES)
def case(request):
    """A network, what is removed, and what of that has 1x1 filters then."""
    return NETS[request.param], *CASES[request.param]


def as_dense(net, smaller, implants):
    """The dense model with kernels that are zero but for their centre, and what reads them, from an implanted one."""
    dense = net.model()
    for layer, numbers in implants.items():
        chain, numbers = net.chains[layer], sorted(numbers)
        writer, reader = dense.get_submodule(chain.writer), dense.get_submodule(chain.reader)
        inputs, kernel = smaller.get_submodule(chain.writer).implant, torch.zeros(3, 3, dtype=torch.float64)
        kernel[1, 1] = 1
        kept = [group.kept for group in find_groups(smaller) if group.layer == layer - 1]
        read = kept[0] if chain.writer == net.chains[layer - 1].reader and layer else range(writer.in_channels)
        writer.weight.data[numbers] = 0
        for place, channel in enumerate(read):
            writer.weight.data[numbers, channel] = inputs.data[:, place] * kernel
        written = [group.kept for group in find_groups(smaller) if group.layer == layer + 1]
        last = len(net.chains) - 1
        rows = written[0] if layer < last and net.chains[layer + 1].writer == chain.reader else slice(None)
        columns = smaller.get_submodule(chain.reader)
        for place, number in enumerate(numbers):
            values = reader.weight.data[:, number].clone()
            values[rows] = whole_rows(columns)[:, place - len(numbers)]
            reader.weight.data[:, number] = values
    return dense


def whole_rows(convolution):
    """A convolution's weight, with zeros around its 1x1 filters."""
    if not hasattr(convolution, "implant"):
        return convolution.weight.data
    small = torch.zeros(len(convolution.implant), *convolution.weight.shape[1:], dtype=torch.float64)
    small[:, :, 1, 1] = convolution.implant.data[:, :, 0, 0]
    return torch.cat([convolution.weight.data, small])


def masked_logits(dense, net, removed, implants):
    gone = {layer: sorted({*numbers} - {*implants.get(layer, ())}) for layer, numbers in removed.items()}
    with masked(dense, net, masks_without(net, gone)):
        return dense(**net.batch()).logits


def test_equals_a_dense_model_with_kernels_of_one_pixel(case):
    net, removed, implants = case
    smaller = with_implants(net, removed, implants, torch.float64)
    expected = masked_logits(as_dense(net, smaller, implants), net, removed, implants)
    torch.testing.assert_close(smaller(**net.batch()).logits, expected, rtol=0, atol=1e-10)
    assert (expected - masked_logits(net.model(), net, removed, {})).abs().max() > 1e-3


def test_starts_from_zero_and_learns(case):
    net, removed, implants = case
    model, plan = net.model(), PruningPlan.for_model(net.model(), channels=removed, implants=implants)
    promised = count_parameters(model) - plan.count_parameters(model)
    apply_plan(model, plan)
    assert count_parameters(model) == promised
    expected = masked_logits(net.model(), net, removed, {})
    torch.testing.assert_close(model(**net.batch()).logits, expected, rtol=0, atol=1e-10)
    model.train()(**net.batch()).logits.square().sum().backward()
    for layer, numbers in implants.items():
        reader = model.get_submodule(net.chains[layer].reader)
        assert reader.weight.grad[:, -len(numbers) :].abs().max() > 0


def test_copies_and_undoing(case):
    net, removed, implants = case
    smaller = with_implants(net, removed, implants, torch.float64)
    twin = copy.deepcopy(smaller)
    assert torch.equal(twin(**net.batch()).logits, smaller(**net.batch()).logits)
    model = net.model()
    expected, names = model(**net.batch()).logits, [name for name, _ in model.named_parameters()]
    with pytest.raises(KeyboardInterrupt), undone_on_error(model):
        apply_plan(model, PruningPlan.for_model(model, channels=removed, implants=implants))
        raise KeyboardInterrupt
    assert torch.equal(model(**net.batch()).logits, expected)
    assert [name for name, _ in model.named_parameters()] == names


def scores_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(g.num_components, generator=generator, dtype=torch.float64) for g in find_groups(model)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("budget", ["params", "flops"])
@pytest.mark.parametrize("ratio, share", [(0.3, 0.6), (0.45, 0.3)])
def test_budgets_hold_and_promises_are_kept(name, budget, ratio, share):
    """At least the share goes, at most one channel more; of what goes, the most sensitive channels are replaced."""
    net = NETS[name]
    model, batch, scores = net.model(), net.batch(), scores_of(net.model())
    settings = {"budget": budget, "ratio": ratio, "inputs": batch if budget == "flops" else None}
    plan = plan_pruning(hand_made("hessian_trace", channels=scores), model, implant_ratio=share, **settings)
    assert plan.implants
    for layer, numbers in plan.implants.items():
        gone = sorted(plan.removed["channels"][layer], key=lambda number, layer=layer: scores[layer][number])
        assert {*numbers} == {*gone[-len(numbers) :]}
    costs = costs_in_layers(model, net, budget)
    ends = [(chain.writer, *chain.followers, chain.reader) for chain in net.chains]
    most = max(
        sum(costs.get(path, 0) for path in paths) / chain.components
        for paths, chain in zip(ends, net.chains, strict=True)
    )
    apply_plan(model, plan)
    assert count_parameters(model) == plan.promise["parameters"]
    assert budget == "params" or count_flops(model, batch) == plan.promise["flops"]
    whole, left = sum(costs.values()), sum(costs_in_layers(model, net, budget).values())
    assert 0 <= whole - left - ratio * whole < most


def test_the_most_sensitive_share_of_all_filters_is_replaced():
    """By the recipe of the paper: a tenth, in the whole network."""
    net = CONVNETS["resnet-basic"]
    model = net.model(hidden_sizes=[32, 48])
    plan = plan_pruning(hand_made("hessian_trace", channels=scores_of(model)), model, HapConfig.paper(ratio=0.5))
    without = plan_pruning(
        hand_made("hessian_trace", channels=scores_of(model)), model, HapConfig.paper(ratio=0.5, implant_ratio=0.0)
    )
    replaced = sum(map(len, plan.implants.values()))
    assert replaced == pytest.approx(0.1 * without.count("channels"), abs=1)
    assert plan.count("channels") > without.count("channels")
    apply_plan(model, plan)
    assert count_parameters(model) == plan.promise["parameters"] <= without.promise["parameters"]


def seen_by(model, path, batches):
    found = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: found.append((args[0], out)))
    for batch in batches:
        model(**batch)
    handle.remove()
    return [torch.cat(parts).detach().movedim(1, -1).flatten(0, -2).numpy() for parts in zip(*found, strict=True)]


def test_filters_behind_the_residual_stream_are_regressions():
    """On what they read; the norm behind them gets the statistics of what they give."""
    batches = [BASIC.batch(8, seed=seed) for seed in range(2)]
    dense, smaller = BASIC.model(), BASIC.model()
    apply_plan(smaller, PruningPlan.for_model(smaller, channels={1: [0, 3, 6]}, implants={1: [6, 3]}))
    reconstruct(smaller, dense, batches, ridge=1e-9, init_implants=[1], progress=False)
    chain = BASIC.chains[1]
    x, given = seen_by(smaller, chain.writer, batches)
    _, wanted = seen_by(dense, chain.writer, batches)
    expected, *_ = np.linalg.lstsq(x - x.mean(0), wanted[:, [3, 6]] - wanted[:, [3, 6]].mean(0), rcond=None)
    filters = smaller.get_submodule(chain.writer).implant.detach().flatten(1).numpy()
    np.testing.assert_allclose(filters, expected.T, rtol=0, atol=1e-6)
    (path,) = chain.followers
    norm, before = smaller.get_submodule(path), dense.get_submodule(path)
    np.testing.assert_allclose(norm.running_mean[-2:], given[:, -2:].mean(0), atol=1e-9)
    np.testing.assert_allclose(norm.running_var[-2:], given[:, -2:].var(0), rtol=1e-6)
    means = [seen_by(model, path, batches)[1].mean(0) for model in (smaller, dense)]
    np.testing.assert_allclose(means[0][-2:], means[1][[3, 6]], atol=1e-9)
    scales = [n.weight * (n.running_var + n.eps).rsqrt() for n in (norm, before)]
    torch.testing.assert_close(scales[0][-2:], scales[1][[3, 6]])


def test_filters_within_a_block_are_regressions():
    """They are fitted to what the norm behind gives in the dense model."""
    batches = [BOTTLENECK.batch(8, seed=seed) for seed in range(2)]
    dense, smaller = BOTTLENECK.model(), BOTTLENECK.model()
    apply_plan(smaller, PruningPlan.for_model(smaller, channels={3: [0, 2]}, implants={3: [0, 2]}))
    reconstruct(smaller, dense, batches, ridge=1e-9, init_implants=[3], progress=False)
    chain = BOTTLENECK.chains[3]
    (norm,) = chain.followers
    x, _ = seen_by(smaller, chain.writer, batches)
    wanted, given = seen_by(dense, norm, batches)[1][:, [0, 2]], seen_by(smaller, norm, batches)[1][:, -2:]
    x = x[: len(given)] if x.shape[0] == len(given) else strided(smaller, chain.writer, batches)
    centred = x - x.mean(0)
    expected = wanted.mean(0) + centred @ np.linalg.lstsq(centred, wanted - wanted.mean(0), rcond=None)[0]
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-6)


def strided(model, path, batches):
    """The pixels that the centres of a convolution with a stride read."""
    stride, found = model.get_submodule(path).stride, []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: found.append(args[0][:, :, :: stride[0], :: stride[1]])
    )
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat(found).detach().movedim(1, -1).flatten(0, -2).numpy()


@pytest.mark.parametrize("name", REPLACED)
def test_a_filter_that_reads_one_pixel_is_replaced_without_loss(name):
    net, (removed, implants) = NETS[name], REPLACED[name]
    batches = [net.batch(8, seed=seed) for seed in range(2)]
    dense = net.model()
    for layer, numbers in removed.items():
        taps = dense.get_submodule(net.chains[layer].writer).weight.data
        keep = torch.zeros(taps.shape[2:], dtype=taps.dtype)
        keep[taps.shape[2] // 2, taps.shape[3] // 2] = 1
        taps[sorted(implants.get(layer, ()))] *= keep
        for number in {*numbers} - {*implants.get(layer, ())}:  # The others do nothing.
            dense.get_submodule(net.chains[layer].reader).weight.data[:, number] = 0
    smaller = copy.deepcopy(dense)
    apply_plan(smaller, PruningPlan.for_model(smaller, channels=removed, implants=implants))
    expected = dense(**batches[0]).logits
    assert (smaller(**batches[0]).logits - expected).abs().max() > 1e-3
    reconstruct(smaller, dense, batches, ridge=1e-10, init_implants=list(implants), progress=False)
    torch.testing.assert_close(smaller(**batches[0]).logits, expected, rtol=0, atol=1e-5)


def test_layers_with_implants_are_tuned():
    net, (removed, implants) = BASIC, REPLACED["resnet-basic"]
    batches = [net.batch(8, seed=seed) for seed in range(2)]
    smaller, dense = with_implants(net, removed, implants, torch.float64), net.model()
    before = [(smaller(**batch).logits - dense(**batch).logits).norm() for batch in batches]
    filters = smaller.get_submodule(net.chains[0].writer).implant.clone()
    tune_layers(smaller, dense, batches, epochs=5, learning_rate=1e-2, progress=False)
    assert not torch.equal(smaller.get_submodule(net.chains[0].writer).implant, filters)
    assert sum((smaller(**b).logits - dense(**b).logits).norm() for b in batches) < sum(before)


def test_reloaded(case, tmp_path):
    net, removed, implants = case
    if net is OWN:
        pytest.skip("it is no model of Transformers")
    smaller = with_implants(net, removed, implants, torch.float64)
    smaller.save_pretrained(tmp_path)
    again = type(smaller).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(**net.batch()).logits, smaller(**net.batch()).logits)
    assert [g.kept for g in find_groups(again)] == [g.kept for g in find_groups(smaller)]
    assert again.config.quantization_config == smaller.config.quantization_config
    assert all(parameter.numel() or not parameter.requires_grad for parameter in again.parameters())
    assert smaller.config.quantization_config["implants"] == {str(k): sorted(v) for k, v in implants.items()}
    again.save_pretrained(tmp_path / "again")
    last = type(smaller).from_pretrained(tmp_path / "again", dtype=torch.float64)
    assert torch.equal(last(**net.batch()).logits, smaller(**net.batch()).logits)


WRONG = ({"0": 2}, {"0": [2]}, {"0": [5, 1]}, {"0": [True]}, {"0": []}, {"0": [99]}, {"9": [1]}, {"0": "15"})


@pytest.mark.parametrize("record", WRONG, ids=str)
def test_a_wrong_record_is_refused(tmp_path, record):
    smaller = with_implants(BASIC, *REPLACED["resnet-basic"], torch.float32)
    smaller.config.quantization_config["implants"] = record
    smaller.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gives (layer '.' an implant of rank|'.*' the shape)"):
        type(smaller).from_pretrained(tmp_path)


def test_is_not_scored_or_pruned_again():
    """The other channels of the model can be pruned by hand."""
    smaller = with_implants(BASIC, {0: [1, 2]}, {0: [1]}, torch.float64)
    before = smaller(**BASIC.batch()).logits
    batch = {**BASIC.batch(), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match=r"layers\.0\.layer\.0\.convolution', by which .* has an implant"):
        estimate_sensitivity(smaller, [batch], progress=False)
    with pytest.raises(ValueError, match="channels of layer 0 are written or read, has an implant"):
        apply_plan(smaller, PruningPlan.for_model(smaller, channels={0: [3]}))
    assert torch.equal(smaller(**BASIC.batch()).logits, before)
    apply_plan(smaller, PruningPlan.for_model(smaller, channels={1: all_components(BASIC)[1]}))
    assert smaller.config.quantization_config["implants"] == {"0": [1]}
    assert [group.num_components for group in find_groups(smaller)] == [7, 0, 12]


@pytest.mark.parametrize(
    "name, removed, implants, message",
    [
        ("resnet-basic", {0: [1, 2]}, {0: 1}, r"implants 1 in layer 0, where it removes \[1, 2\]. Name some of the"),
        ("resnet-basic", {0: [1, 2]}, {0: [3]}, r"implants \[3\] in layer 0"),
        ("resnet-basic", {0: [1, 2]}, {1: [1]}, r"implants \[1\] in layer 1, where it removes \[\]"),
        ("resnet-bottleneck", {0: [1, 2]}, {0: [1]}, "the channels of layer 0 of .* needs filters larger than 1x1"),
        ("mobilenet_v2", {0: [1]}, {0: [1]}, "an implant needs filters larger than 1x1 around a pixel in the"),
    ],
)
def test_what_cannot_be_replaced_is_refused(name, removed, implants, message):
    model = CONVNETS[name].model()
    with pytest.raises(ValueError, match=message):
        apply_plan(model, PruningPlan.for_model(model, channels=removed, implants=implants))
    assert not hasattr(model.config, "pruned_channels")


def test_a_network_without_large_filters_is_refused_when_it_is_planned():
    model = CONVNETS["regnet-y"].model()
    with pytest.raises(ValueError, match="implant_ratio=0.1, but no channels that go can be replaced by implants"):
        plan_pruning(hand_made("hessian_trace", channels=scores_of(model)), model, ratio=0.3, implant_ratio=0.1)
    plan_pruning(hand_made("hessian_trace", channels=scores_of(model)), model, ratio=0.3)


def test_plans_are_saved(tmp_path):
    model = BASIC.model()
    plan = PruningPlan.for_model(model, channels={0: [1, 2, 5]}, implants={0: (5, 1)})
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    assert again == plan and again.implants == {0: [1, 5]} and again.ranks == {0: 2}


def test_adapters_are_added_to_convolutions_with_implants():
    net, (removed, implants) = BASIC, REPLACED["resnet-basic"]
    smaller, batch = with_implants(net, removed, implants, torch.float64), net.batch(4)
    expected = smaller(**batch).logits
    adapted = get_peft_model(smaller, LoraConfig(target_modules=["convolution"], r=2))
    torch.testing.assert_close(adapted(**batch).logits, expected)  # Adapters start from zero.
    adapted(**batch).logits.sum().backward()
    assert any("lora_B" in name and p.grad.any() for name, p in adapted.named_parameters() if p.grad is not None)
