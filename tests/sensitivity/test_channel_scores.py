"""Scores of channels equal those from explicit derivatives, and from patches of images cut out one by one."""

import dataclasses

import pytest
import torch
from convnets import CONVNETS, masked, scored_weights, sum_by_component
from explicit import gauss_newton_diagonals
from image_patches import patches_of, tokens_of
from own_convnet import NETS, of_all
from scipy.stats import spearmanr
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from hap_transformers import METHODS, PruningPlan, apply_plan, estimate_sensitivity
from hap_transformers.components import convolutions
from hap_transformers.components.convolutions import Convolution
from hap_transformers.sensitivity import hutchinson
from hap_transformers.sensitivity.kronecker import kronecker
from hap_transformers.sensitivity.surgeon import removal_costs


pytestmark = pytest.mark.usefixtures("known_convnet")
EXACT = {"rtol": 1e-8, "atol": 1e-12}


@pytest.fixture(scope="module")
def model(net):
    """A model that tests only read."""
    return net.model()


def labelled(net, size=4, **arguments):
    return {**net.batch(size, **arguments), "labels": torch.arange(size) % 3}


def scored(model, batches, method, **arguments):
    return estimate_sensitivity(model, batches, method, progress=False, **arguments)


def loss_of(batch):
    return lambda logits: F.cross_entropy(logits, batch["labels"])


@of_all
def test_gauss_newton_traces(net, model):
    batch, weights = labelled(net), scored_weights(model, net)
    traces = sum_by_component(net, gauss_newton_diagonals(model, weights, batch, loss_of(batch)))
    result = scored(model, [batch], "gauss_newton_trace")
    norms = sum_by_component(net, {name: weight**2 for name, weight in weights.items()})
    sizes = sum_by_component(net, {name: torch.ones_like(weight) for name, weight in weights.items()})
    for layer, trace in enumerate(traces):
        torch.testing.assert_close(result.traces[net.kind][layer], trace, **EXACT)
        torch.testing.assert_close(result.scores[net.kind][layer], trace * norms[layer] / (2 * sizes[layer]), **EXACT)


def test_magnitude(net, model):
    squares = {name: weight**2 for name, weight in scored_weights(model, net).items()}
    for found, norms in zip(
        scored(model, [], "magnitude").scores[net.kind], sum_by_component(net, squares), strict=True
    ):
        torch.testing.assert_close(found, norms.sqrt(), **EXACT)


def test_scores_of_masks(net, model):
    """Absolute gradients of single examples, and halves of the Gauss-Newton matrix's diagonal."""
    batch, size = labelled(net), 4
    masks = [torch.ones(size, chain.components, dtype=torch.float64, requires_grad=True) for chain in net.chains]
    with masked(model, net, masks, mixing=False):
        logits = model(batch["pixel_values"]).logits
    losses = F.cross_entropy(logits, batch["labels"], reduction="sum")
    gradients = torch.autograd.grad(losses, masks, retain_graph=True)
    jacobians = [torch.autograd.grad(logits[:, k].sum(), masks, retain_graph=True) for k in range(3)]
    p = logits.detach().softmax(1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    found = {method: scored(model, [batch], method).scores[net.kind] for method in ("gradient", "fisher")}
    for layer, gradient in enumerate(gradients):
        torch.testing.assert_close(found["gradient"][layer], gradient.abs().mean(0), **EXACT)
        jacobian = torch.stack([of_class[layer] for of_class in jacobians], 1)  # Examples, classes, components.
        diagonal = torch.einsum("nkc,nkl,nlc->c", jacobian, hessians, jacobian) / size
        torch.testing.assert_close(found["fisher"][layer], diagonal / 2, **EXACT)


def seen_by(model, net, inputs):
    """The logits, and what every reader read, and gave."""
    seen, readers = {}, [model.get_submodule(chain.reader) for chain in net.chains]

    def see(module, args, output):
        seen[module] = args[0], output

    handles = [reader.register_forward_hook(see) for reader in readers]
    logits = model(inputs).logits
    for handle in handles:
        handle.remove()
    return logits, [seen[reader] for reader in readers]


def cotangents_of(logits, outputs):
    """Every example's gradients of the logits times a root of the Hessian of the cross-entropy, by direction."""
    p = logits.detach().softmax(1)
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
    roots = vectors * values.clamp_min(0).sqrt()[:, None]
    return [torch.autograd.grad((logits * roots[:, :, k]).sum(), outputs, retain_graph=True) for k in range(3)]


@of_all
def test_kronecker_costs(net, model, monkeypatch):
    """All positions count here, and the proxies are sums over positions without products of two."""
    monkeypatch.setattr(convolutions, "POSITIONS", 10**6)
    batch, samples = labelled(net), []

    def sample(task, given):
        samples.append(kronecker(task, given))
        return samples[-1]

    monkeypatch.setitem(METHODS, "kronecker", dataclasses.replace(METHODS["kronecker"], sample=sample))
    result = scored(model, [batch], "kronecker")
    logits, seen = seen_by(model, net, batch["pixel_values"])
    directions = cotangents_of(logits, [outputs for _, outputs in seen])
    proxies = []
    for layer, (chain, (inputs, _)) in enumerate(zip(net.chains, seen, strict=True)):
        reader = model.get_submodule(chain.reader)
        patches = patches_of(inputs.detach(), reader)
        cotangents = [tokens_of(of_direction[layer], reader) for of_direction in directions]
        rows = patches.flatten(0, 1)
        if chain.norm is not None or reader.bias is not None:  # Which makes up for means.
            rows = rows - rows.mean(0)
        curvature = sum(torch.einsum("nto,ntp->op", g, g) for g in cotangents) / len(logits)
        weight = reader.weight.detach().flatten(1)
        size = weight.shape[1] // chain.components
        factors = rows.T @ rows / len(rows), weight.T @ curvature @ weight
        order, costs = removal_costs(*factors, size, by_input=net.kind == "neurons")  # ConvNeXt normalizes first.
        assert result.order[net.kind][layer].argsort().tolist() == order.tolist()
        torch.testing.assert_close(result.scores[net.kind][layer][order], costs.cummax(0).values, **EXACT)
        norms = patches.square().unflatten(2, (chain.components, -1)).sum(3)
        if net.kind == "channels":
            proxies.append(sum(torch.einsum("ntc,nto->nc", norms, g.square()) for g in cotangents))
    if proxies:
        torch.testing.assert_close(samples[0].values, torch.cat(proxies, 1), **EXACT)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1)},
        {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    ],
    ids=str,
)
def test_sampled_positions(settings):
    """Every image has 64 of its own, at which inputs and outputs are seen."""
    module = torch.nn.Conv2d(3, 2, **settings).double()
    view = Convolution("reader", module)
    inputs = torch.randn(5, 3, 22, 19, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patches, outputs = patches_of(inputs, module), module(inputs)
    length = outputs[0, 0].numel()
    numbers = torch.arange(length, dtype=torch.float64).view(1, 1, *outputs.shape[2:]).expand(5, -1, -1, -1)
    places = view.seen(numbers)[..., 0].long()
    assert places.shape == (5, 64) and places.max() < length
    assert all(len(set(row)) == 64 for row in places.tolist())
    assert len({tuple(row) for row in places.tolist()}) == 5
    read = view.read(inputs)
    assert torch.equal(read, torch.stack([image[row] for image, row in zip(patches, places, strict=True)]))
    torch.testing.assert_close(view.seen(outputs), F.linear(read, module.weight.flatten(1), module.bias), **EXACT)
    torch.testing.assert_close(view.tokens(inputs, 5), patches, **EXACT)
    assert view.read(inputs[:, :0]).shape == (5, 64, 0)


def test_a_constant_is_free_where_a_norm_or_bias_follows():
    """The reader of 1x1 sees no border, and what a channel always gives can go into the mean."""
    net = CONVNETS["resnet-bottleneck"]
    model = net.model()
    norm = model.get_submodule(net.chains[1].followers[0])
    norm.weight.data[2], norm.bias.data[2] = 0, 5
    result = scored(model, [labelled(net, 8)], "kronecker")
    assert result.order["channels"][1][2] == 0


def exact_estimates(model, net, batch, probes):
    """For given probes v, the sums over positions of dg . (v x) and of g . (v dx), weight by weight.

    g are gradients of what modules give, x what they read, and d denotes derivatives in the direction v. The loss is
    differentiated in maps that are added to what the modules give.

    Args:
        probes: A probe for each scored weight, by name.
    """
    parameters = dict(model.named_parameters())
    modules = {name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in probes}

    def run(step, added):
        """The loss at weights that are moved, and what the modules read."""
        read, handles = {}, []
        for path, module in modules.items():

            def see(module, args, output, path=path):
                read[path] = args[0]
                return output + added[path] if added else None

            handles.append(module.register_forward_hook(see))
        moved = {name: parameters[name].detach() + step * probe for name, probe in probes.items()}
        try:
            logits = torch.func.functional_call(model, moved, (batch["pixel_values"],)).logits
        finally:
            for handle in handles:
                handle.remove()
        return F.cross_entropy(logits, batch["labels"]), read

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    _, read = run(zero, None)
    nothing = {path: torch.zeros_like(module(read[path])) for path, module in modules.items()}
    both = lambda step: (torch.func.grad(lambda added: run(step, added)[0])(nothing), run(step, None)[1])  # noqa: E731
    (gradients, _), (changes, moves) = torch.func.jvp(both, (zero,), (one,))
    first, second = {}, {}
    for path, module in modules.items():
        for sums, factors, inputs in ((first, changes, read), (second, gradients, moves)):
            weight = parameters[f"{path}.weight"]
            # A linear map of x by v, so that derivatives in v tell what every weight contributes.
            given = (module(inputs[path].detach()) * factors[path].detach()).sum()
            name = f"{path}.weight"
            sums[name] = torch.autograd.grad(given, weight)[0] * probes[name]
        if f"{path}.bias" in probes:
            channels = changes[path].flatten(0, -2) if net.kind == "neurons" else changes[path].movedim(1, -1)
            first[f"{path}.bias"] = channels.flatten(0, -2).sum(0).detach() * probes[f"{path}.bias"]
    return first, second


def test_hutchinson_by_given_probes(net, model, monkeypatch):
    """The estimate is v . Hv without the sum whose mean is zero, also of what is both read and written."""
    batch, probes, draw = labelled(net), {}, hutchinson.Owned.draw
    paths = {module: path for path, module in model.named_modules()}

    def drawing(self, *args):
        weight, bias = draw(self, *args)
        path = paths[self.view.module]
        probes[f"{path}.weight"] = weight.view(self.view.module.weight.shape)
        if bias is not None:
            probes[f"{path}.bias"] = bias
        return weight, bias

    monkeypatch.setattr(hutchinson.Owned, "draw", drawing)
    result = scored(model, [batch], "hessian_trace", num_probes=1)
    weights = scored_weights(model, net)
    assert probes.keys() == weights.keys()
    assert all(set(probe.unique().tolist()) == {-1, 1} for probe in probes.values())
    first, second = exact_estimates(model, net, batch, probes)
    for found, expected in zip(result.traces[net.kind], sum_by_component(net, first), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)

    def loss(*values):
        moved = dict(zip(weights, values, strict=True))
        logits = torch.func.functional_call(model, moved, (batch["pixel_values"],)).logits
        return F.cross_entropy(logits, batch["labels"])

    products = torch.autograd.functional.vhp(loss, tuple(weights.values()), tuple(probes[name] for name in weights))[1]
    for name, product in zip(weights, products, strict=True):
        whole = first[name].sum() + second.get(name, torch.zeros(1)).sum()
        torch.testing.assert_close((product * probes[name]).sum(), whole, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("emptied", [0, 1])
@pytest.mark.parametrize("name", ["resnet-bottleneck", "regnet-y", "own"])
def test_scores_beside_chains_without_channels(name, emptied):
    """The writer, or the reader, of the neighbouring chain has lost all its inputs, or outputs."""
    net = NETS[name]
    pruned, batch = net.model(), labelled(net)
    counts = [chain.components for chain in net.chains]
    counts[emptied] = 0
    apply_plan(pruned, PruningPlan.for_model(pruned, channels={emptied: range(net.chains[emptied].components)}))
    left = dataclasses.replace(net, chains=tuple(c for i, c in enumerate(net.chains) if i != emptied))
    weights = scored_weights(pruned, left)
    traces = sum_by_component(left, gauss_newton_diagonals(pruned, weights, batch, loss_of(batch)))
    for method in ("gauss_newton_trace", "hessian_trace", "kronecker", "gradient", "fisher"):
        result = scored(pruned, [batch], method)
        scores = result.scores["channels"]
        assert [len(layer) for layer in scores] == counts and all(layer.isfinite().all() for layer in scores)
        if method == "gauss_newton_trace":
            found = result.traces["channels"]
            for trace, expected in zip(found[:emptied] + found[emptied + 1 :], traces, strict=True):
                torch.testing.assert_close(trace, expected, **EXACT)


def test_low_precision_ranks_alike():
    net = CONVNETS["resnet-basic"]
    model = net.model(torch.float32)
    batches = [labelled(net, 16, seed=seed, dtype=torch.float32) for seed in range(2)]
    exact, low = (scored(model, batches, "kronecker", precision=precision) for precision in (None, "bf16"))
    for first, second in zip(exact.scores["channels"], low.scores["channels"], strict=True):
        assert spearmanr(first, second).statistic > 0.95


def test_batches_do_not_matter():
    """Nor what comes after an interruption."""
    net = CONVNETS["regnet-y"]
    model, batch = net.model(), labelled(net, 6)
    parts = [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(4), slice(4, 6))]
    for method in ("kronecker", "gauss_newton_trace", "fisher"):
        whole, split = scored(model, [batch], method), scored(model, parts, method)
        for first, second in zip(whole.scores["channels"], split.scores["channels"], strict=True):
            torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-12)


def test_advice_on_images_names_no_tokens():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 7])}
    with pytest.raises(ValueError, match="loss of batch 0, .* Check that inputs have the model's shape, and labels"):
        estimate_sensitivity(ResNetForImageClassification(config), [batch], progress=False)
