"""Removing channels of convolutions, or neurons of ConvNeXt, equals masking them, and saves what was promised."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from convnets import CONVNETS, all_components, costs_in_layers, masked, masked_logits, masks_without
from own_convnet import of_all
from tiny import hand_made
from torch import nn
from transformers import AutoModelForImageClassification

from hap_transformers import ARCHITECTURES, PruningPlan, apply_plan, plan_pruning
from hap_transformers.components.groups import find_groups
from hap_transformers.components.names import ChannelNames
from hap_transformers.efficiency import count_flops, count_parameters


pytestmark = pytest.mark.usefixtures("known_convnet")


@pytest.fixture(scope="module")
def dense(net):
    """A model that tests only read."""
    return net.model()


def some_components(net, seed=0, share=0.4):
    """Random components of every chain."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (torch.rand(chain.components, generator=generator) < share).nonzero().flatten().tolist()
        for layer, chain in enumerate(net.chains)
    }


def without(model, net, gone):
    """A copy of a model without some components."""
    smaller = copy.deepcopy(model)
    apply_plan(smaller, PruningPlan.for_model(smaller, **{net.kind: gone}))
    return smaller


def logits(model, net):
    return model(**net.batch(dtype=model.dtype)).logits


def random_scores(model, net, method="kronecker", seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = [
        torch.rand(group.num_components, generator=generator, dtype=torch.float64) for group in find_groups(model)
    ]
    return hand_made(method, **{net.kind: scores})


@of_all
def test_chains_are_those_written_out(net, dense):
    groups = find_groups(dense)
    assert {group.kind.name for group in groups} == {net.kind}
    for layer, (group, chain) in enumerate(zip(groups, net.chains, strict=True)):
        assert (group.layer, group.num_components, group.original) == (layer, chain.components, chain.components)
        assert [projection.module for projection in group.writers] == [dense.get_submodule(chain.writer)]
        assert [projection.module for projection in group.readers] == [dense.get_submodule(chain.reader)]
        assert [p.module for p in group.followers] == [dense.get_submodule(path) for path in chain.followers]


@of_all
def test_every_component_matters(net, dense):
    """Otherwise the comparison with masks would prove nothing. Each image lacks another component."""
    image = net.batch(1)["pixel_values"]
    whole = dense(image).logits
    for layer, chain in enumerate(net.chains):
        masks = masks_without(net, {})
        masks[layer] = 1 - torch.eye(chain.components, dtype=torch.float64)
        with masked(dense, net, masks):
            found = dense(image.expand(chain.components, -1, -1, -1)).logits
        assert ((found - whole).abs().amax(1) > 1e-4).all()


@of_all
def test_removing_equals_masking(net, dense):
    """Some components of all chains, all of a single chain, and all of all; as many parameters go as the plan says."""
    everything, last = all_components(net), len(net.chains) - 1
    cases = [some_components(net), some_components(net, seed=1, share=0.8), everything]
    cases += [{layer: everything[layer]} for layer in (0, 1, last)]
    for gone in cases:
        smaller, promised = without(dense, net, gone), PruningPlan.for_model(dense, **{net.kind: gone})
        expected = masked_logits(dense, net, gone)
        torch.testing.assert_close(logits(smaller, net), expected, rtol=0, atol=1e-10)
        assert count_parameters(dense) - count_parameters(smaller) == promised.count_parameters(dense)


def test_what_is_left_has_the_sizes_that_are_left(net, dense):
    gone = some_components(net)
    smaller = without(dense, net, gone)
    for layer, chain in enumerate(net.chains):
        left = chain.components - len(gone[layer])
        for path in (chain.writer, *chain.followers, chain.reader):
            now, before = smaller.get_submodule(path), dense.get_submodule(path)
            assert now.weight.numel() * chain.components <= before.weight.numel() * left
            if isinstance(now, nn.BatchNorm2d):
                assert len(now.running_mean) == len(now.running_var) == now.num_features == len(now.weight)
        reader = smaller.get_submodule(chain.reader)
        assert reader.weight.shape[1] * chain.components == dense.get_submodule(chain.reader).weight.shape[1] * left


def test_pruning_twice_equals_pruning_once(net, dense):
    first, second = some_components(net), some_components(net, seed=1)
    both = {layer: sorted({*first[layer], *second[layer]}) for layer in first}
    more = {layer: sorted({*both[layer]} - {*first[layer]}) for layer in both}
    if net.kind == "neurons":  # They are numbered anew.
        left = {layer: sorted({*every} - {*first[layer]}) for layer, every in all_components(net).items()}
        more = {layer: [left[layer].index(number) for number in numbers] for layer, numbers in more.items()}
    twice, once = without(without(dense, net, first), net, more), without(dense, net, both)
    assert getattr(twice.config, "pruned_channels", None) == getattr(once.config, "pruned_channels", None)
    assert twice.config.quantization_config == once.config.quantization_config
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in twice.state_dict().items())


def test_copies_and_pickles(net, dense):
    """Of modules that have lost some channels, or all."""
    for gone in (some_components(net), all_components(net)):
        smaller = without(dense, net, gone)
        expected = logits(smaller, net)
        for copied in (copy.deepcopy(smaller), pickle.loads(pickle.dumps(smaller))):
            assert torch.equal(logits(copied, net), expected)
            assert [group.kept for group in find_groups(copied)] == [group.kept for group in find_groups(smaller)]


def test_training_what_is_left(net, dense):
    smaller = without(dense, net, {**some_components(net), 0: all_components(net)[0]})
    before = logits(smaller, net)
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.01)
    logits(smaller.train(), net).square().sum().backward()
    optimizer.step()
    assert not torch.equal(logits(smaller.eval(), net), before) and logits(smaller, net).isfinite().all()


@of_all
@pytest.mark.parametrize("budget", ["params", "flops"])
def test_budgets_are_met_and_promises_kept(net, dense, budget):
    """At least the share goes, at most one component more, from a dense model and from one that was pruned before."""
    model, batch = copy.deepcopy(dense), net.batch()
    costs = costs_in_layers(dense, net, budget)
    whole = sum(costs.values())
    most = max(
        sum(costs.get(path, 0) for path in (chain.writer, *chain.followers, chain.reader)) / chain.components
        for chain in net.chains
    )
    for seed, ratio in enumerate((0.15, 0.4)):
        scores, inputs = random_scores(model, net, seed=seed), batch if budget == "flops" else None
        plan = plan_pruning(scores, model, budget=budget, ratio=ratio, inputs=inputs, neuron_multiple=1)
        before, removed = count_parameters(model), plan.count_parameters(model)
        apply_plan(model, plan)
        assert count_parameters(model) == plan.promise["parameters"] == before - removed
        assert budget == "params" or count_flops(model, batch) == plan.promise["flops"]
        assert 0 <= whole - sum(costs_in_layers(model, net, budget).values()) - ratio * whole < most


def test_a_share_of_the_components(net, dense):
    model = copy.deepcopy(dense)
    scores = random_scores(model, net)
    plan = plan_pruning(scores, model, budget=net.kind, ratio=0.5, inputs=net.batch(), neuron_multiple=1)
    apply_plan(model, plan)
    total = sum(chain.components for chain in net.chains)
    assert sum(group.num_components for group in find_groups(model)) == total - round(0.5 * total)
    assert count_flops(model, net.batch()) == plan.promise["flops"]


def test_floors_keep_a_share_of_every_chain():
    """Scores that foresee no refit leave at least a twentieth of a chain."""
    net = CONVNETS["resnet-basic"]
    model = net.model()
    apply_plan(model, plan_pruning(random_scores(model, net, "gradient"), model, budget="channels", ratio=0.85))
    assert all(group.num_components for group in find_groups(model))
    with pytest.raises(ValueError, match="every layer keeps at least 1 channels"):
        plan_pruning(random_scores(model, net, "gradient"), model, budget="channels", ratio=0.99)


BASIC = CONVNETS["resnet-basic"]


def with_entry(monkeypatch, **changes):
    """Replaces the chain of a basic ResNet's entry in the library's table."""
    entry = ARCHITECTURES["resnet"]
    chain = dataclasses.replace(entry.names["channels"].chains[0], **changes)
    names = {"channels": ChannelNames((chain,), "shortcut")}
    monkeypatch.setitem(ARCHITECTURES, "resnet", dataclasses.replace(entry, names=names))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"followers": ("layer.0.activation",)},
            r"'encoder\.stages\.0\.layers\.0\.layer\.0\.activation' of ResNetForImageClassification is a ReLU, which",
        ),
        (
            {"reader": "shortcut.convolution"},
            r"'encoder\.stages\.0\.layers\.0\.shortcut\.convolution' of ResNetForImageClassification reads 6 "
            r"channels, but .*layer\.0\.convolution' and what lies between give \[8\]",
        ),
        ({"writer": "layer.0.normalization"}, r"'.*layer\.0\.normalization' of .* is no convolution"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(monkeypatch, changes, message):
    model = BASIC.model()
    with_entry(monkeypatch, **changes)
    with pytest.raises(ValueError, match=message):
        find_groups(model)


def test_a_grouped_convolution_is_no_writer_and_no_reader():
    for place in (0, 1):
        model = BASIC.model()
        path = f"encoder.stages.0.layers.1.layer.{place}.convolution"
        model.base_model.get_submodule(path.rpartition(".")[0]).convolution = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        with pytest.raises(ValueError, match=rf"'{path}' of .* is no convolution of all channels \(groups=1\)"):
            find_groups(model)


@pytest.mark.parametrize("lacking", ["affine", "track_running_stats"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_norm_that_is_no_fixed_map_is_refused(lacking, place):
    model = BASIC.model()
    path = f"encoder.stages.0.layers.1.layer.{place}.normalization"
    model.base_model.get_submodule(path.rpartition(".")[0]).normalization = nn.BatchNorm2d(8, **{lacking: False})
    with pytest.raises(ValueError, match=f"'{path}' of .* without weights or running statistics"):
        find_groups(model)


def test_a_layer_of_another_size_is_refused():
    """It was changed after pruning."""
    smaller = without(BASIC.model(), BASIC, {1: [0, 3]})
    layer = smaller.base_model.encoder.stages[0].layers[1].layer
    for convolution in (layer[0], layer[1]):
        convolution.convolution.weight = nn.Parameter(convolution.convolution.weight[:5, :5].detach())
    layer[0].normalization = nn.BatchNorm2d(5)
    layer[1].convolution.in_channels = 5
    with pytest.raises(ValueError, match="reads 5 channels, but was left 6 by pruning"):
        find_groups(smaller)


@pytest.mark.parametrize(
    "gone, message",
    [
        ({3: [0]}, "the model has layers 0 to 2. Nothing was pruned"),
        ({0: [8]}, r"channels \[8\] of layer 0: they are numbered 0 to 7, as in the original model"),
        ({0: [1, 1]}, "names a channel of layer 0 twice"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(gone, message):
    with pytest.raises(ValueError, match=message):
        PruningPlan.for_model(BASIC.model(), channels=gone)


def test_a_config_that_another_model_pruned_is_refused():
    model = BASIC.model()
    other = type(model)(model.config)
    other.config = model.config
    apply_plan(model, PruningPlan.for_model(model, channels={0: [1]}))
    with pytest.raises(ValueError, match="records a different pruning of layer 0 than its weights show"):
        apply_plan(other, PruningPlan.for_model(other, channels={1: [0]}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pruned checkpoint."""
    model = BASIC.model(torch.float32)
    apply_plan(model, PruningPlan.for_model(model, channels={0: [1, 5], 2: range(12)}))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def edited(saved, tmp_path, change):
    """The checkpoint with a config that was changed by hand."""
    config = json.loads((saved / "config.json").read_text())
    change(config, config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    return tmp_path


def test_the_record(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["pruned_channels"] == {"0": [1, 5], "2": list(range(12))}
    assert config["quantization_config"] == {"quant_method": "hap", "channels": {"0": 6, "2": 0}}
    loaded = AutoModelForImageClassification.from_pretrained(saved)
    assert loaded.config.pruned_channels == {0: [1, 5], 2: list(range(12))}
    assert [len(group.kept) for group in find_groups(loaded)] == [6, 8, 0]
    assert find_groups(loaded)[0].kept == [0, 2, 3, 4, 6, 7]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, s: s["channels"].update({"9": 4}), "channels by layer as .*has layers 0 to 2"),
        (lambda c, s: s["channels"].update({"layer.0.convolution": 4}), "channels by layer as .*has layers 0 to 2"),
        (lambda c, s: s.update({"channels": [4]}), "channels by layer as"),
        (lambda c, s: s["channels"].update({"0": 10**12}), "expected a whole number from 0 to 8"),
        (lambda c, s: s["channels"].update({"0": -4}), "expected a whole number"),
        (lambda c, s: s["channels"].update({"0": "6"}), "expected a whole number"),
        (lambda c, s: s["channels"].update({"2": False}), "expected a whole number"),
        (lambda c, s: s["channels"].update({"0": 2}), "pruned_channels leaves it 6 of 8"),
        (lambda c, s: c.update(pruned_channels={}), "pruned_channels leaves it 8 of 8"),
        (lambda c, s: c["pruned_channels"].update({"9": [0]}), "pruned_channels of the checkpoint's config are"),
        (lambda c, s: c["pruned_channels"].update({"0": [1, 99]}), "pruned_channels of the checkpoint's config are"),
        (lambda c, s: c["pruned_channels"].update({"0": "15"}), "pruned_channels of the checkpoint's config are"),
        (lambda c, s: (s["channels"].update({"0": 7}), c["pruned_channels"].update({"0": [1]})), "belong together"),
        (lambda c, s: (s["channels"].pop("0"), c["pruned_channels"].pop("0")), "belong together"),
        (lambda c, s: s.update(heads={"0": 1}), "records heads, but .* of the kinds channels only"),
    ],
)
def test_a_config_edited_by_hand_is_refused(saved, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(edited(saved, tmp_path, change))
