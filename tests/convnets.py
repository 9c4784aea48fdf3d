"""Tiny convolutional models of Transformers, and the paths of the convolutions that channels own."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from hap_transformers import PruningPlan, apply_plan


@dataclass(frozen=True)
class Chain:
    """What lies between two convolutions, or linear maps of every position, as paths from the model.

    Args:
        writer: The one whose outputs the components are.
        followers: What lies between and shrinks with them.
        reader: The one that reads them.
        components: How many can go one by one: the channels, or the groups of a grouped follower.
        norm: The BatchNorm of what the reader gives.
        added: What is added to that: the output of a module, or the input of one of the convolutions.
        mixing: The follower that reads a mean or norm of all components together, so that a mask must come before.
    """

    writer: str
    followers: tuple[str, ...]
    reader: str
    components: int
    norm: str | None = None
    added: str | None = None
    mixing: str | None = None


@dataclass(frozen=True)
class ConvNet:
    """One architecture.

    Paths are written out here, so the library's table of architectures is checked against an independent one.

    Args:
        family: Prefix of its classes in Transformers.
        layers: Regular expression for what the paths of all modules in layers begin with.
        chains: In the order in which the model runs them, which is that of the layers' numbers.
        sizes: Arguments of the config.
        kind: What the components are.
    """

    family: str
    layers: str
    chains: tuple[Chain, ...]
    sizes: dict[str, Any] = field(default_factory=dict)
    kind: str = "channels"

    @property
    def classes(self) -> tuple[type, type]:
        """Those of the config and of the model."""
        return getattr(transformers, self.family + "Config"), getattr(transformers, self.family + TASK)

    def config(self, **changes: Any):
        return self.classes[0](**{"num_labels": 3, **self.sizes, **changes})

    def model(self, dtype: torch.dtype = torch.float64, **changes: Any):
        """The model, with weights large enough that every channel matters, and random running statistics."""
        model = self.classes[1](self.config(**changes))
        torch.manual_seed(0)
        randomize(model.double(), self.batch(8))
        return model.to(dtype).eval()

    def batch(self, size: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (size, 3, SIDE, SIDE)
        return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)}


def randomize(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> None:
    """Draws weights that keep the size of what goes through, and running statistics not far from those of a batch.

    Far from them, some channels would be zero everywhere behind a ReLU.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5)
        elif not isinstance(module, nn.BatchNorm2d):
            for parameter in module.parameters(recurse=False):
                parameter.data += 0.3 * torch.randn_like(parameter)
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.1, 0.7)
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(**batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 2)


CONVOLUTION, NORM = "convolution", "normalization"


def _resnet(layers: Sequence[tuple[int, int]], convolutions: int, channels: Sequence[int]) -> tuple[Chain, ...]:
    """The chains of a ResNet: those between all neighbouring convolutions of a layer.

    Args:
        layers: Stage and place of each layer.
        convolutions: How many a layer has.
        channels: Of each layer.
    """
    chains = []
    for (stage, place), count in zip(layers, channels, strict=True):
        inside = f"resnet.encoder.stages.{stage}.layers.{place}.layer."
        for i in range(convolutions - 1):
            writer, reader = inside + f"{i}.", inside + f"{i + 1}."
            added = inside.removesuffix("layer.") + "shortcut" if i == convolutions - 2 else None
            ends = writer + CONVOLUTION, (writer + NORM,), reader + CONVOLUTION
            chains.append(Chain(*ends, count, reader + NORM, added))
    return tuple(chains)


def _regnet(layers: Sequence[tuple[int, int]], groups: Sequence[int], squeezed: bool) -> tuple[Chain, ...]:
    """The chains of a RegNet: the groups of a layer's second convolution.

    Args:
        layers: Stage and place of each layer.
        groups: Of each layer.
        squeezed: Whether layers have squeeze-and-excitation, before the last convolution.
    """
    chains = []
    for (stage, place), count in zip(layers, groups, strict=True):
        block = f"regnet.encoder.stages.{stage}.layers.{place}."
        inside = block + "layer."
        between = [inside + path for path in (f"0.{NORM}", f"1.{CONVOLUTION}", f"1.{NORM}")]
        between += [inside + f"2.attention.{i}" for i in (0, 2) if squeezed]
        last, mixing = inside + f"{2 + squeezed}.", between[3] if squeezed else None
        ends = inside + f"0.{CONVOLUTION}", tuple(between), last + CONVOLUTION
        chains.append(Chain(*ends, count, last + NORM, block + "shortcut", mixing))
    return tuple(chains)


def _mobilenet(inside: str, channels: int, adds: bool) -> Chain:
    """The chain of a layer of MobileNetV2, which may add its input."""
    between = (f"expand_1x1.{NORM}", f"conv_3x3.{CONVOLUTION}", f"conv_3x3.{NORM}")
    paths = [f"expand_1x1.{CONVOLUTION}", *between, f"reduce_1x1.{CONVOLUTION}", f"reduce_1x1.{NORM}"]
    writer, *between, reader, norm = (inside + path for path in paths)
    return Chain(writer, tuple(between), reader, channels, norm, writer if adds else None)


def _efficientnet(inside: str, channels: int, adds: bool) -> Chain:
    """The chain of a block of EfficientNet, which may add its input."""
    between = ("expansion.expand_bn", "depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm")
    between = (*between, "squeeze_excite.reduce", "squeeze_excite.expand")
    paths = ["expansion.expand_conv", *between, "projection.project_conv", "projection.project_bn"]
    writer, *between, reader, norm = (inside + path for path in paths)
    return Chain(writer, tuple(between), reader, channels, norm, writer if adds else None, between[3])


def _convnext(inside: str, neurons: int, grn: bool) -> Chain:
    """The chain of a layer of ConvNeXt."""
    norm = inside + "grn" if grn else None
    return Chain(inside + "pwconv1", (norm,) if norm else (), inside + "pwconv2", neurons, mixing=norm)


SIDE = 24  # Pixels.
TASK = "ForImageClassification"
LAYERS = ((0, 0), (0, 1), (1, 0))
STAGES = {"embedding_size": 6, "depths": [2, 1]}
CONVNEXT = {"num_stages": 2, "hidden_sizes": [4, 6], "depths": [1, 2], "patch_size": 4}
CONVNETS: dict[str, ConvNet] = {
    "resnet-basic": ConvNet(
        "ResNet",
        r"resnet\.encoder\.stages\.\d\.layers\.",
        _resnet(LAYERS, 2, (8, 8, 12)),
        {**STAGES, "hidden_sizes": [8, 12], "layer_type": "basic"},
    ),
    "resnet-bottleneck": ConvNet(
        "ResNet",
        r"resnet\.encoder\.stages\.\d\.layers\.",
        _resnet(LAYERS, 3, (4, 4, 6)),
        {**STAGES, "hidden_sizes": [16, 24], "layer_type": "bottleneck"},
    ),
    "regnet-x": ConvNet(
        "RegNet",
        r"regnet\.encoder\.stages\.\d\.layers\.",
        _regnet(LAYERS, (4, 4, 6), squeezed=False),
        {**STAGES, "hidden_sizes": [8, 12], "groups_width": 2, "layer_type": "x"},
    ),
    "regnet-y": ConvNet(
        "RegNet",
        r"regnet\.encoder\.stages\.\d\.layers\.",
        _regnet(LAYERS, (4, 4, 6), squeezed=True),
        {**STAGES, "hidden_sizes": [8, 12], "groups_width": 2, "layer_type": "y"},
    ),
    "mobilenet_v2": ConvNet(
        "MobileNetV2",
        r"mobilenet_v2\.layer\.",
        tuple(
            _mobilenet(f"mobilenet_v2.layer.{i}.", count, i in (1, 3, 4, 6, 7, 8, 10, 11, 13, 14))
            for i, count in enumerate((*6 * (4,), *4 * (8,), *3 * (12,), *3 * (16,)))
        ),
        {
            "depth_multiplier": 0.1,
            "expand_ratio": 1,
            "depth_divisible_by": 4,
            "min_depth": 4,
            "finegrained_output": False,
            "output_stride": 8,  # So that later layers have dilated convolutions.
            "hidden_act": "silu",
        },
    ),
    "efficientnet": ConvNet(
        "EfficientNet",
        r"efficientnet\.encoder\.blocks\.",
        tuple(_efficientnet(f"efficientnet.encoder.blocks.{i}.", 16, i == 2) for i in (1, 2)),
        {
            "width_coefficient": 0.1,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3, 5],
            "in_channels": [32, 80],
            "out_channels": [80, 80],
            "strides": [1, 2],
            "num_block_repeats": [1, 2],
            "expand_ratios": [1, 2],
            "depth_divisor": 4,
            "hidden_dim": 128,
        },
    ),
    "convnext": ConvNet(
        "ConvNext",
        r"convnext\.encoder\.stages\.\d\.layers\.",
        tuple(
            _convnext(f"convnext.encoder.stages.{stage}.layers.{place}.", count, grn=False)
            for stage, place, count in ((0, 0, 16), (1, 0, 24), (1, 1, 24))
        ),
        {**CONVNEXT, "layer_scale_init_value": 1.0},
        "neurons",
    ),
    "convnextv2": ConvNet(
        "ConvNextV2",
        r"convnextv2\.encoder\.stages\.\d\.layers\.",
        tuple(
            _convnext(f"convnextv2.encoder.stages.{stage}.layers.{place}.", count, grn=True)
            for stage, place, count in ((0, 0, 16), (1, 0, 24), (1, 1, 24))
        ),
        CONVNEXT,
        "neurons",
    ),
}


# The sixteen layers of MobileNetV2 take as long as several of the others.
QUICK = [name for name in CONVNETS if name != "mobilenet_v2"]


def all_components(net: ConvNet) -> dict[int, list[int]]:
    """All components of all chains."""
    return {layer: list(range(chain.components)) for layer, chain in enumerate(net.chains)}


def with_one_emptied(net: ConvNet, dtype: torch.dtype):
    """A model without some components of its first chain, and without any of the second."""
    model, gone = net.model(dtype), {0: [1, 2], 1: all_components(net)[1]}
    apply_plan(model, PruningPlan.for_model(model, **{net.kind: gone}))
    return model


# Removed from chains by number, and those of them that stay with a 1x1 filter.
REPLACED = {
    "resnet-basic": ({0: [1, 2, 5], 2: range(12)}, {0: [5, 1], 2: [3]}),
    "resnet-bottleneck": ({0: [2], 1: [0, 1, 3], 2: range(4), 5: [1, 4]}, {1: [3, 0], 5: [1, 4]}),
}


def with_implants(net: ConvNet, removed, implants, dtype: torch.dtype, seed: int = 0):
    """A model with 1x1 filters, and what reads them, of random weights."""
    model = net.model(dtype)
    apply_plan(model, PruningPlan.for_model(model, channels=removed, implants=implants))
    generator = torch.Generator().manual_seed(seed)
    for layer, numbers in implants.items():
        writer, reader = (model.get_submodule(getattr(net.chains[layer], name)) for name in ("writer", "reader"))
        for weight in (writer.implant, reader.weight[:, -len(numbers) :]):
            weight.data.copy_(0.5 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return model


def costs_in_layers(model, net, budget):
    """Parameters of all modules in layers, or FLOPs of their products by the sizes that hooks see, by path."""
    inside = {name: module for name, module in model.named_modules() if re.match(net.layers, name)}
    if budget == "params":
        return {name: sum(p.numel() for p in module.parameters(recurse=False)) for name, module in inside.items()}
    costs, handles = {}, []
    for name, module in inside.items():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def see(module, args, output, name=name):
                costs[name] = 2 * output.numel() * module.weight.shape[1:].numel()
                if hasattr(module, "implant"):  # Its filters read a single pixel.
                    beyond = module.weight.shape[1:].numel() - module.implant.shape[1]
                    costs[name] -= 2 * output.numel() * len(module.implant) // output.shape[1] * beyond

            handles.append(module.register_forward_hook(see))
    model(**net.batch())
    for handle in handles:
        handle.remove()
    return costs


def masks_without(net: ConvNet, gone: Mapping[int, Sequence[int]]) -> list[torch.Tensor]:
    """For every chain a mask of ones, and of zeros for components that have gone."""
    masks = [torch.ones(chain.components, dtype=torch.float64) for chain in net.chains]
    for layer, numbers in gone.items():
        masks[layer][list(numbers)] = 0
    return masks


@contextmanager
def masked(model: nn.Module, net: ConvNet, masks: Sequence[torch.Tensor], mixing: bool = True) -> Iterator[None]:
    """Multiplies the components that are read.

    Args:
        masks: For every chain, shape `(components,)`, or `(examples, components)`.
        mixing: Whether to multiply what followers read of all components together, too.
    """

    def multiply(mask: torch.Tensor):
        def hook(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            dim = 1 if net.kind == "channels" else 3
            whole = mask.repeat_interleave(args[0].shape[dim] // mask.shape[-1], -1)
            whole = whole[..., None, None] if net.kind == "channels" else whole[..., None, None, :]
            return (args[0] * whole.to(args[0].dtype),)

        return hook

    handles = []
    for chain, mask in zip(net.chains, masks, strict=True):
        for path in filter(None, (chain.reader, chain.mixing if mixing else None)):
            handles.append(model.get_submodule(path).register_forward_pre_hook(multiply(mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked_logits(model: nn.Module, net: ConvNet, gone: Mapping[int, Sequence[int]]) -> torch.Tensor:
    """Logits of a dense model that ignores the components that have gone."""
    with masked(model, net, masks_without(net, gone)):
        return model(**net.batch(dtype=model.dtype)).logits


def scored_weights(model: nn.Module, net: ConvNet) -> dict[str, torch.Tensor]:
    """All weights that components own, by name."""
    parameters = dict(model.named_parameters())
    names = [
        name
        for chain in net.chains
        for name in (f"{chain.writer}.weight", f"{chain.writer}.bias", f"{chain.reader}.weight")
    ]
    return {name: parameters[name].detach() for name in dict.fromkeys(names) if name in parameters}


def sum_by_component(net: ConvNet, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Sums numbers given for each weight over what every component owns, for every chain shape `(components,)`."""
    sums = []
    for chain in net.chains:
        parts = [values[f"{chain.writer}.weight"], values[f"{chain.reader}.weight"].transpose(0, 1)]
        if f"{chain.writer}.bias" in values:
            parts.append(values[f"{chain.writer}.bias"])
        sums.append(sum(part.reshape(chain.components, -1).sum(1) for part in parts))
    return sums
