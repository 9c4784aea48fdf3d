"""Refits of convolutions equal NumPy's least squares on patches of images, and restore what others can make up for."""

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from convnets import QUICK
from image_patches import patches_of, tokens_of
from own_convnet import NETS, of_all
from torch import nn

from hap_transformers import PruningPlan, apply_plan, estimate_sensitivity, reconstruct, tune_layers
from hap_transformers.components import convolutions
from hap_transformers.refit.dense_copy import sharing_copy
from hap_transformers.sensitivity.surgeon import removal_costs


pytestmark = pytest.mark.usefixtures("known_convnet")
RIDGE = 0.01


def batches_of(net, count=2, **arguments):
    return [net.batch(8, seed=seed, **arguments) for seed in range(count)]


def without(model, net, gone):
    """A copy of a model without some components."""
    smaller = copy.deepcopy(model)
    apply_plan(smaller, PruningPlan.for_model(smaller, **{net.kind: gone}))
    return smaller


def seen_by(model, net, batches):
    """What writers, readers, norms behind them and shortcuts read and gave on all batches, by path."""
    paths = {path for chain in net.chains for path in (chain.writer, chain.reader, chain.norm, chain.added) if path}
    seen, handles = {path: ([], []) for path in paths}, []
    for path in paths:

        def see(module, args, output, path=path):
            for found, tensor in zip(seen[path], (args[0], output), strict=True):
                found.append(tensor.detach().clone())  # Some models add to an output in place.

        handles.append(model.get_submodule(path).register_forward_hook(see))
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return {path: [torch.cat(tensors) for tensors in both] for path, both in seen.items()}


def added_to(chain, model, seen):
    """What is added to what a reader gives."""
    if chain.added is None:
        return 0
    inputs, outputs = seen[chain.added]
    return inputs if isinstance(model.get_submodule(chain.added), nn.Conv2d) else outputs


def target_and_given(chain, smaller, dense):
    """What a reader, or the norm behind it, must give: the dense sum less what is added; and what it gives.

    Args:
        smaller, dense: Each model, and what was seen in it.
    """
    (smaller, found), (dense, wanted) = smaller, dense
    total, given = (seen[chain.norm or chain.reader][1] for seen in (wanted, found))
    return total + added_to(chain, dense, wanted) - added_to(chain, smaller, found), given


def regression(net, chain, gone, smaller, dense):
    """Patches that the pruned model's reader reads, what it must give of them, and what it gives, in NumPy."""
    reader, written = smaller[0].get_submodule(chain.reader), {c.writer: i for i, c in enumerate(net.chains)}
    target, given = (tokens_of(tensor, reader) for tensor in target_and_given(chain, smaller, dense))
    outputs = np.arange(target.shape[2])
    if chain.reader in written:  # It writes the channels of the next chain.
        outputs = np.setdiff1d(outputs, gone[written[chain.reader]])
    x = patches_of(smaller[1][chain.reader][0], reader)
    return (tensor.flatten(0, 1).numpy() for tensor in (x, target[..., outputs], given))


def map_of(model, chain):
    """The affine map that a reader and the norm behind it are, and what it is if it has a bias."""
    reader = model.get_submodule(chain.reader)
    matrix, offset = reader.weight.detach().flatten(1), 0 if reader.bias is None else reader.bias.detach()
    if chain.norm is not None:
        norm = model.get_submodule(chain.norm)
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
        matrix, offset = scale[:, None] * matrix, norm.bias.detach() + scale * (offset - norm.running_mean)
    return matrix.numpy(), np.asarray(offset), chain.norm is not None or reader.bias is not None


def ridge_regression(x, y, start, centred):
    """Matrix and offset by `numpy.linalg.lstsq`, with the ridge towards another matrix as further rows."""
    means = (x.mean(0), y.mean(0)) if centred else (0 * x[0], 0 * y[0])
    root = np.sqrt(RIDGE * ((x - means[0]) ** 2).sum(0).mean())
    rows = np.vstack([x - means[0], root * np.eye(x.shape[1])])
    matrix = np.linalg.lstsq(rows, np.vstack([y - means[1], root * start.T]), rcond=None)[0].T
    return matrix, means[1] - matrix @ means[0]


@of_all
def test_equals_least_squares(net, monkeypatch):
    """Of all positions; statistics of norms are those of what they then read."""
    monkeypatch.setattr(convolutions, "POSITIONS", 10**6)
    dense, batches = net.model(), batches_of(net)
    if net.chains[0].norm is not None:
        dense.get_submodule(net.chains[0].norm).weight.data[1] = 0  # This gives no scale to go by.
    gone = {layer: [1] for layer in range(len(net.chains))}
    before = without(dense, net, gone)
    smaller = copy.deepcopy(before)
    reconstruct(smaller, dense, batches, ridge=RIDGE, progress=False)
    both, changes = [(model, seen_by(model, net, batches)) for model in (smaller, dense)], []
    for chain in net.chains:
        x, y, given = regression(net, chain, gone, *both)
        (start, _, centred), (matrix, offset, _) = map_of(before, chain), map_of(smaller, chain)
        fitted, expected = ridge_regression(x, y, start, centred)
        np.testing.assert_allclose(matrix, fitted, rtol=0, atol=1e-8)
        np.testing.assert_allclose(offset, expected, rtol=0, atol=1e-8)
        np.testing.assert_allclose(given, x @ fitted.T + offset, rtol=0, atol=1e-8)
        changes.append(np.abs(fitted - start).max())
        if chain.norm is not None:
            norm, read = smaller.get_submodule(chain.norm), both[0][1][chain.norm][0].movedim(1, 0).flatten(1)
            torch.testing.assert_close(norm.running_mean, read.mean(1), rtol=0, atol=1e-8)
            torch.testing.assert_close(norm.running_var, read.var(1, correction=0), rtol=0, atol=1e-8)
    assert min(changes) > 1e-4


def test_what_blocks_read_by_equals_least_squares(net, monkeypatch):
    """On what the pruned model's block reads, its writer gives what it gave on what the dense model's block reads."""
    monkeypatch.setattr(convolutions, "POSITIONS", 10**6)
    dense, batches = net.model(), batches_of(net)
    before = without(dense, net, {layer: [1] for layer in range(len(net.chains))})
    smaller = copy.deepcopy(before)
    reconstruct(smaller, dense, batches, ridge=RIDGE, progress=False)
    found, wanted = (seen_by(model, net, batches) for model in (smaller, dense))
    readers, changes = {chain.reader for chain in net.chains}, []
    for path in (chain.writer for chain in net.chains if chain.writer not in readers):
        old, new = before.get_submodule(path), smaller.get_submodule(path)
        x, read = (patches_of(seen[path][0], old).flatten(0, 1).numpy() for seen in (found, wanted))
        start, matrix = (module.weight.detach().flatten(1).numpy() for module in (old, new))
        bias = 0 if old.bias is None else old.bias.detach().numpy()
        fitted, expected = ridge_regression(x, read @ start.T + bias, start, old.bias is not None)
        np.testing.assert_allclose(matrix, fitted, rtol=0, atol=1e-8)
        if new.bias is not None:
            np.testing.assert_allclose(new.bias.detach().numpy(), expected, rtol=0, atol=1e-8)
        changes.append(np.abs(fitted - start).max())
    assert changes[-1] > 1e-4  # The first block of all reads what it did.


def duplicate(model, net):
    """Makes component 1 of the first chain a copy of component 0."""
    chain = net.chains[0]
    for path in (chain.writer, *chain.followers):
        module = model.get_submodule(path)
        if path == chain.mixing and isinstance(module, nn.Conv2d):  # What is squeezed goes without the two.
            module.weight.data.unflatten(1, (chain.components, -1))[:, :2] = 0
            continue
        for tensor in (*module.parameters(), *(buffer for buffer in module.buffers() if buffer.ndim)):
            components = tensor.data.squeeze().unflatten(0, (chain.components, -1))
            components[1] = components[0]


def test_one_of_two_copies_costs_next_to_nothing(net, monkeypatch):
    """Then the other costs what both did."""
    monkeypatch.setattr("hap_transformers.sensitivity.kronecker.removal_costs", partial(removal_costs, ridge=1e-9))
    model = net.model()
    duplicate(model, net)
    batches = [{**batch, "labels": torch.arange(8) % 3} for batch in batches_of(net)]
    result = estimate_sensitivity(model, batches, "kronecker", progress=False)
    costs = result.scores[net.kind][0]
    first, last = costs[:2].sort().values
    assert first < 1e-4 * costs[2:].median() < last
    assert 0 in result.order[net.kind][0][:2]


@pytest.fixture(params=[10**6, 16])
def positions(request, monkeypatch):
    """How many positions of an image are seen."""
    monkeypatch.setattr(convolutions, "POSITIONS", request.param)
    convolutions._some.cache_clear()
    yield
    convolutions._some.cache_clear()


# The response norm of ConvNeXt V2 is relative to the mean over all neurons, so that no two are copies.
@pytest.mark.parametrize("name", [name for name in (*QUICK, "own") if name != "convnextv2"])
def test_what_others_can_make_up_for_is_restored(name, positions):
    """Also where outputs and inputs are seen at some positions only, which then must be the same."""
    net = NETS[name]
    dense, batches = net.model(), batches_of(net, 4)
    duplicate(dense, net)
    smaller, expected = without(dense, net, {0: [1]}), dense(**batches[0]).logits
    lost = (smaller(**batches[0]).logits - expected).abs().max()
    reconstruct(smaller, dense, batches, ridge=0, progress=False)
    torch.testing.assert_close(smaller(**batches[0]).logits, expected, rtol=0, atol=1e-6)
    assert lost > 1e-3


def test_a_block_without_components_gives_the_mean(net):
    """Of the dense sum less what is added to it."""
    dense, batches, chain = net.model(), batches_of(net), net.chains[-1]
    smaller = without(dense, net, {0: [1], len(net.chains) - 1: range(chain.components)})
    reconstruct(smaller, dense, batches, progress=False)
    both = [(model, seen_by(model, net, batches)) for model in (smaller, dense)]
    y, given = (tokens_of(tensor, dense.get_submodule(chain.reader)) for tensor in target_and_given(chain, *both))
    torch.testing.assert_close(given, y.mean((0, 1)).expand_as(given), rtol=0, atol=1e-8)


def values_of(model):
    """All weights and statistics."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_fitted_where_nothing_is_gone(net):
    dense = net.model()
    model, before = copy.deepcopy(dense), values_of(dense)
    reconstruct(model, dense, batches_of(net), progress=False)
    assert unchanged(model, before) and unchanged(dense, before)


def test_pixels_that_are_no_numbers_are_named(net):
    dense, batches = net.model(), batches_of(net)
    smaller = without(dense, net, {1: [0]})
    before, of_dense = values_of(smaller), values_of(dense)
    batches[1]["pixel_values"][0, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"The inputs or targets of '.*' are not finite.*not refitted"):
        reconstruct(smaller, dense, batches, progress=False)
    assert unchanged(smaller, before) and unchanged(dense, of_dense)


@pytest.mark.parametrize("name", ["resnet-bottleneck", "efficientnet"])
def test_a_failure_in_the_middle_undoes_weights_and_statistics(name):
    net = NETS[name]
    dense, batches, then = net.model(), batches_of(net), []
    smaller = without(dense, net, {0: [1], 1: [0, 2]})
    before, statistics = values_of(smaller), smaller.get_submodule(net.chains[0].norm).running_mean

    def forward(model, inputs):
        if not torch.equal(statistics, before[f"{net.chains[0].norm}.running_mean"]):  # The first fit is done.
            then.append(not unchanged(smaller, before))
            raise RuntimeError("interrupted")
        return model(**inputs)

    with pytest.raises(RuntimeError, match="interrupted"):
        reconstruct(smaller, dense, batches, forward=forward, progress=False)
    assert then == [True] and unchanged(smaller, before)


@pytest.mark.parametrize("name", ["resnet-bottleneck", "efficientnet", "convnextv2"])
def test_a_dense_copy_that_shares_weights_is_followed(name):
    """Its statistics and weights stay, and the fit is the same."""
    net, gone = NETS[name], {0: [0, 1], 1: [2]}
    dense, batches = net.model(), batches_of(net)
    smaller, sharing = without(dense, net, gone), net.model()
    copied = sharing_copy(sharing)
    apply_plan(sharing, PruningPlan.for_model(sharing, **{net.kind: gone}))
    for model, followed in ((smaller, dense), (sharing, copied)):
        reconstruct(model, followed, batches, progress=False)
    assert unchanged(sharing, values_of(smaller)) and unchanged(copied, values_of(dense))


@pytest.mark.parametrize("name", ["resnet-bottleneck", "efficientnet"])
def test_layers_can_be_tuned(name):
    """The first layer comes nearer to the dense one, whose input is the same, than without a refit."""
    net = NETS[name]
    dense, batches = net.model(), batches_of(net)
    smaller = without(dense, net, {0: [0, 1]})
    layer = re.match(net.layers + r"\d+", net.chains[0].writer)[0]

    def distance():
        given = []
        for model in (smaller, dense):
            handle = model.get_submodule(layer).register_forward_hook(
                lambda module, args, output: given.append(output)
            )
            model(**batches[0])
            handle.remove()
        return (given[0] - given[1]).square().mean()

    before, of_dense = distance(), values_of(dense)
    tune_layers(smaller, dense, batches, epochs=10, learning_rate=1e-2, progress=False)
    assert distance() < 0.9 * before and unchanged(dense, of_dense)
