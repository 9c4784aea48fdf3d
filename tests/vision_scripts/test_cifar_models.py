"""The CIFAR networks: their sizes, how their blocks compute, and that they are models of Transformers."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CIFAR10, ROOT, needs_cifar10
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForImageClassification

from hap_transformers import export_remote_code
from hap_transformers.efficiency import example_inputs
from hap_transformers.reporting.card import loader_of
from hap_transformers.reporting.wording import loading_code
from vision_scripts.cifar_configs import CIFAR_NETWORKS, CifarPreResNetConfig, CifarResNetConfig, cifar_config
from vision_scripts.cifar_models import (
    CifarPreResNetForImageClassification,
    CifarPreResNetModel,
    CifarResNetForImageClassification,
    CifarResNetModel,
)
from vision_scripts.cifar_weights import load_dense_weights


SIZES = {"depth": 2, "widths": (4, 6, 8)}
KINDS = {
    "basic": SIZES,
    "basic, 1x1 shortcuts": {**SIZES, "padded_shortcut": False},
    "preactivation": {**SIZES, "block": "preactivation", "stem_width": 3, "padded_shortcut": False},
    "bottleneck": {**SIZES, "block": "bottleneck", "padded_shortcut": False},
}


def config_of(kind, **settings):
    config_class = CifarPreResNetConfig if "block" in KINDS[kind] else CifarResNetConfig
    return config_class(**{**KINDS[kind], **settings})


def make(config):
    return AutoModelForImageClassification.from_config(config).eval()


@pytest.fixture(params=KINDS)
def tiny_network(request):
    """A tiny network whose norms and running statistics do something."""
    torch.manual_seed(0)
    model = make(config_of(request.param, num_labels=3))
    for name, tensor in model.state_dict().items():
        if "norm" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model


# As the papers give them: He et al. 2015 (table 6), Zagoruyko and Komodakis 2016, HAP, EHAP.
@pytest.mark.parametrize(
    "name, millions",
    [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85), ("wrn-32", 7.43), ("wrn-28-8", 23.35)],
)
def test_parameters_of_the_papers_networks(name, millions):
    with torch.device("meta"):
        model = make(cifar_config(name, num_labels=10))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions
    assert len(model.base_model.blocks) == {"wrn-28-8": 12, "wrn-32": 15}.get(name, 3 * ((int(name[-2:]) - 2) // 6))


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_costs_that_the_documentation_names(name):
    with torch.device("meta"):
        model = make(cifar_config(name, num_labels=10))
    parameters, counter = sum(parameter.numel() for parameter in model.parameters()), FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**example_inputs(model))
    costs = f"| {parameters:,} | {counter.get_total_flops() / 2e6:,.0f} million |"
    assert any(f"`{name}`" in line and costs in line for line in (ROOT / "docs" / "vision.md").open()), costs
    known = {"preresnet29": ("2,235,850", "360 million"), "resnet56": ("853,018", "125 million")}
    assert all(figure in costs for figure in known.get(name, ()))


def modules_of(name):
    """The reference definitions beside the shared weights."""
    spec = importlib.util.spec_from_file_location("networks", CIFAR10 / "dense" / "networks.py")
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    return networks.make(name)


@needs_cifar10
@pytest.mark.parametrize("name", ["preresnet29", "resnet56"])
def test_logits_with_shared_weights_are_those_of_the_reference(name):
    file = CIFAR10 / "dense" / f"{name}.safetensors"
    reference = modules_of(name).eval()
    reference.load_state_dict(load_file(file))
    model = make(cifar_config(name, num_labels=10))
    load_dense_weights(model, file)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, reference(images), rtol=1e-5, atol=1e-5)


def test_each_block_adds_its_last_convolution_to_the_shortcut(tiny_network):
    """The names that an entry of the table of architectures gives, and that stage by stage the image halves."""
    found, sizes = {}, []
    for block in tiny_network.base_model.blocks:
        for name, module in block.named_children():
            module.register_forward_hook(lambda m, given, output, key=(block, name): found.update({key: output}))
        block.register_forward_hook(lambda m, given, output: found.update({m: output}))
    tiny_network(torch.randn(2, 3, 12, 8))
    for block in tiny_network.base_model.blocks:
        convolutions = [name for name, _ in block.named_children() if name.startswith("conv")]
        assert {"shortcut", *(f"norm{i + 1}" for i in range(len(convolutions)))} < set(dict(block.named_children()))
        branch = found[block, "norm2"] if tiny_network.config.block == "basic" else found[block, convolutions[-1]]
        total = branch + found[block, "shortcut"]
        assert torch.equal(found[block], total.relu() if tiny_network.config.block == "basic" else total)
        sizes.append(list(total.shape[1:]))
    assert sizes == [[4, 12, 8], [4, 12, 8], [6, 6, 4], [6, 6, 4], [8, 3, 2], [8, 3, 2]]


def test_a_padded_shortcut_takes_every_other_pixel(tiny_network):
    shortcut, images = tiny_network.base_model.blocks[2].shortcut, torch.randn(2, 4, 6, 6)
    shortened = shortcut(images)
    if tiny_network.config.padded_shortcut:
        assert torch.equal(shortened[:, 1:5], images[:, :, ::2, ::2])
        assert not shortened[:, 0].any() and not shortened[:, 5].any() and not list(shortcut.parameters())
    else:
        expected = torch.einsum("oi,nihw->nohw", shortcut.weight[:, :, 0, 0], images[:, :, ::2, ::2])
        torch.testing.assert_close(shortened, expected)


def test_a_preactivated_shortcut_reads_what_the_convolution_reads():
    torch.manual_seed(0)
    block = CifarPreResNetModel(config_of("preactivation")).blocks[2].train()
    images = torch.randn(2, 4, 6, 6)
    read = F.relu(F.batch_norm(images, None, None, training=True))
    inner = F.conv2d(read, block.conv1.weight, stride=2, padding=1)
    inner = F.relu(F.batch_norm(inner, None, None, training=True))
    expected = F.conv2d(inner, block.conv2.weight, padding=1) + F.conv2d(read, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(images), expected)


def test_save_and_load(tiny_network, tmp_path):
    tiny_network.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    pre = tiny_network.config.block != "basic"
    expected = CifarPreResNetForImageClassification if pre else CifarResNetForImageClassification
    assert type(again) is type(tiny_network) is expected and not again.training
    for name, tensor in tiny_network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 2, 1])
    outputs, bare = again(images, labels=labels), AutoModel.from_pretrained(tmp_path)(images)
    assert torch.equal(outputs.logits, tiny_network(images).logits)
    torch.testing.assert_close(outputs.loss, -outputs.logits.log_softmax(-1)[range(3), labels].mean())
    torch.testing.assert_close(bare.pooler_output, bare.last_hidden_state.mean((2, 3)))
    assert torch.equal(again(images, return_dict=False)[0], outputs.logits)


def test_statistics_stay_where_an_old_checkpoint_counts_no_batches(tiny_network, tmp_path):
    tiny_network.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "num_batches" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in kept.items())


def test_new_weights_keep_the_variance():
    torch.manual_seed(0)
    weight = CifarResNetModel(cifar_config("wrn-32")).blocks[14].conv1.weight
    assert weight.var().item() == pytest.approx(2 / (9 * 256), rel=0.01)  # He et al., of all outputs of an input.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block": "bottleneck"}, "knows no block 'bottleneck'; choose one of basic"),
        ({"depth": 0}, "must be positive"),
    ],
)
def test_wrong_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        CifarResNetConfig(**settings)


def test_weights_of_another_network_are_named(tiny_network, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file 'nowhere'"):
        load_dense_weights(tiny_network, "nowhere")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_dense_weights(tiny_network, tmp_path / "text")
    stored = {name.removeprefix("backbone."): tensor for name, tensor in tiny_network.state_dict().items()}
    stored["classifier.bias"] = torch.zeros(10)
    save_file(stored, tmp_path / "ten")
    before = tiny_network.base_model.stem.weight.clone()
    with pytest.raises(ValueError, match=r"1 of \d+ tensors differ, such as 'classifier.bias' \(\[10\] in the file"):
        load_dense_weights(tiny_network, tmp_path / "ten")
    assert torch.equal(before, tiny_network.base_model.stem.weight)


def test_cards_name_the_class_that_loads_it(tiny_network, tmp_path):
    loader = loader_of(tiny_network)
    assert loading_code(loader, "PATH").splitlines() == [
        f"from vision_scripts.cifar_models import {type(tiny_network).__name__}",
        "",
        f'model = {type(tiny_network).__name__}.from_pretrained("PATH")',
    ]
    tiny_network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hap", "channels": {"0": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Transformers has no model class"):
        export_remote_code(tmp_path)
