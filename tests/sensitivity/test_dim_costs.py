"""What value dimensions cost, against the exact surgeon's formula, and what other methods say of dimensions."""

import copy

import pytest
import torch
from dims import ALL, head_size, without
from explicit import explicit_factors
from tiny import make_batch, make_batches, make_model
from zoo import HEADS, LAYERS, NORM_FIRST, ZOO

from hap_transformers import estimate_sensitivity, reconstruct
from hap_transformers.alignment.align_heads import align_heads
from hap_transformers.components.groups import find_groups


DIMS = ("query_key_dims", "value_dims")


def columns_of(module, tiny, left=None):
    """Columns of an output projection that each value dimension owns: one, or one for each of two query heads."""
    width = module.weight.shape[0 if module.weight.shape[0] == getattr(module, "nx", -1) else 1]
    left = left or HEADS * [width // (HEADS * (2 if tiny.family == "Llama" else 1))]
    shared, found, start = width // sum(left), [], 0
    for count in left:
        found += [[start + j * count + dim for j in range(shared)] for dim in range(count)]
        start += shared * count
    return found


def surgeon(A, M, owned, by_input=False):
    """Order and costs of removal, by 1/2 tr(M_SS (A^-1)_SS^-1) of all that is gone, with explicit inverses."""
    scale = A.diagonal() if by_input else A.diagonal().mean().expand(len(A))
    A = A + 0.01 * scale.diag()
    P = torch.linalg.inv(A)

    def total(gone):
        S = [column for dim in gone for column in owned[dim]]
        return float((M[S][:, S] @ torch.linalg.inv(P[S][:, S])).trace() / 2)

    gone, costs = [], []
    while len(gone) < len(owned):
        before = total(gone) if gone else 0.0
        added = {dim: total([*gone, dim]) - before for dim in set(range(len(owned))) - set(gone)}
        cheapest = min(added, key=added.get)
        gone, costs = [*gone, cheapest], [*costs, added[cheapest]]
    return torch.tensor(gone), torch.tensor(costs, dtype=torch.float64)


def factors(model, batch, tiny, layer, left=None):
    module = model.get_submodule(f"{tiny.layer.format(layer)}.{tiny.heads_out}")
    seen = []
    # What a projection reads of its inputs, where these hold zeros for what is gone.
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-1]))
    A, C = explicit_factors(model, batch, module)
    handle.remove()
    weight = (module.weight.T if tiny.family == "GPT2" else module.weight).detach()
    if left is not None:
        size = seen[0] // (weight.shape[1] // sum(left)) // sum(count > 0 for count in left)
        places = [head * size + i for head, count in enumerate([c for c in left if c]) for i in range(count)]
        A = A[places][:, places]
    return A, weight.T @ C @ weight, columns_of(module, tiny, left)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5", "vit"])
def test_costs_are_the_exact_surgeons(model_type, aligned):
    tiny = ZOO[model_type]
    model, batch = tiny.model(), {**make_batches(tiny, 1)[0], "labels": torch.arange(8) % 2}
    if aligned:
        align_heads(model, [batch], progress=False)
    found = estimate_sensitivity(model, [batch], components=["value_dims"], progress=False)
    for layer in range(LAYERS):
        order, costs = surgeon(*factors(model, batch, tiny, layer), by_input=model_type in NORM_FIRST)
        scores, places = found.scores["value_dims"][layer], found.order["value_dims"][layer]
        assert places.argsort().tolist()[:8] == order.tolist()[:8]  # The last ones may tie to rounding.
        expected = costs.cummax(0).values
        torch.testing.assert_close(scores.sort().values, expected, rtol=1e-5, atol=1e-8 * float(expected[-1]))


def test_costs_of_what_is_left():
    tiny = ZOO["bert"]
    model, batch = tiny.model(), {**tiny.batch(8), "labels": torch.arange(8) % 2}
    smaller = without(model, tiny, {0: {1: (ALL, ALL), 2: ([], [0, 3])}})
    left = find_groups(smaller, ["value_dims"])[0].runs.left
    assert left == [4, 0, 2, 4]
    found = estimate_sensitivity(smaller, [batch], components=["value_dims"], progress=False)
    order, costs = surgeon(*factors(smaller, batch, tiny, 0, left))
    scores = found.scores["value_dims"][0]
    torch.testing.assert_close(scores[order], costs.cummax(0).values, rtol=1e-5, atol=1e-12)


def test_alignment_makes_few_dimensions_enough():
    """In the new basis the cheaper half of all value dimensions costs less."""
    tiny = ZOO["bert"]
    model, batches = tiny.model(), make_batches(tiny, 2)
    costs = []
    for _ in range(2):
        found = estimate_sensitivity(model, batches, components=["value_dims"], progress=False)
        costs.append([float(scores.sort().values[:8].sum()) for scores in found.scores["value_dims"]])
        align_heads(model, batches, progress=False)
    assert all(after < 0.7 * before for before, after in zip(*costs, strict=True))


def test_hutchinson_refuses_dimensions():
    with pytest.raises(ValueError, match="'hessian_trace' cannot score query_key_dims, value_dims; it scores heads"):
        estimate_sensitivity(ZOO["bert"].model(), [], "hessian_trace", components=DIMS, progress=False)


@pytest.mark.parametrize("method", ["fisher", "gradient"])
def test_methods_that_mask_what_is_read_refuse_query_key_dimensions(method):
    with pytest.raises(ValueError, match=f"'{method}' cannot score query_key_dims; it scores heads, .*value_dims"):
        estimate_sensitivity(make_model(), [make_batch()], method, components=DIMS, progress=False)
    smaller = without(make_model(), ZOO["bert"], {0: {0: ([1], [])}})
    found = estimate_sensitivity(smaller, [make_batch()], method, progress=False)
    assert sorted(found.scores) == ["neurons", "value_dims"]


@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize("method", ["fisher", "gradient"])
def test_masks_lie_on_the_columns_of_their_dimensions(model_type, method):
    """The derivative in a mask is that in a factor of the columns that read the dimension."""
    tiny = ZOO[model_type]
    batch = {**tiny.batch(4), "labels": torch.tensor([0, 1, 1, 0])}
    smaller = without(tiny.model(), tiny, {0: {1: (ALL, ALL), 2: ([], [0, 3])}})
    left = find_groups(smaller, ["value_dims"])[0].runs.left
    found = estimate_sensitivity(smaller, [batch], method, components=["value_dims"], progress=False)
    name = f"{tiny.layer.format(0)}.{tiny.heads_out}"
    module = smaller.get_submodule(name)
    owned, expected = columns_of(module, tiny, left), 0
    weight = module.weight.detach()
    for i in range(4):
        mask = torch.ones(len(owned), dtype=torch.float64, requires_grad=True)
        places = torch.tensor(owned).flatten()
        factor = torch.ones(weight.shape[1]).double().index_copy(0, places, mask.repeat_interleave(len(owned[0])))
        example = {key: value[i : i + 1] for key, value in batch.items()}
        output = torch.func.functional_call(smaller, {f"{name}.weight": weight * factor}, (), example)
        if method == "gradient":
            expected = expected + torch.autograd.grad(output.loss, mask)[0].abs() / 4
            continue
        p = output.logits[0].softmax(0).detach()
        values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        for value, vector in zip(values.clamp_min(0), vectors.T, strict=True):
            (g,) = torch.autograd.grad(output.logits[0] @ vector * value.sqrt(), mask, retain_graph=True)
            expected = expected + g**2 / 8
    torch.testing.assert_close(found.scores["value_dims"][0], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method", ["gauss_newton_trace", "magnitude", "random"])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_other_methods_score_dimensions(model_type, method):
    tiny = ZOO[model_type]
    model = without(tiny.model(attn_implementation="eager"), tiny, {0: {1: (ALL, ALL), 2: ([0], [1])}})
    batches = [{**tiny.batch(4), "labels": torch.arange(4) % 2}]
    found = estimate_sensitivity(model, batches, method, components=DIMS, num_probes=2, progress=False)
    for kind in DIMS:
        counts = [group.num_components for group in find_groups(model, [kind])]
        assert [len(scores) for scores in found.scores[kind]] == counts
        assert all(scores.isfinite().all() and len(scores.unique()) > 1 for scores in found.scores[kind])


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_traces_are_those_of_the_weights_of_a_dimension(model_type, pruned):
    """mean_i sum_k of squared derivatives of s_k . z_i in its rows, biases and columns."""
    tiny = ZOO[model_type]
    model, batch = tiny.model(), {**tiny.batch(3), "labels": torch.tensor([0, 1, 1])}
    if pruned:
        model = without(model, tiny, {0: {1: (ALL, ALL), 2: ([0], [1, 2])}})
    found = estimate_sensitivity(model, [batch], "gauss_newton_trace", components=DIMS, progress=False)
    layer = model.get_submodule(tiny.layer.format(0))
    q, k, v, out = (layer.get_submodule(path) for path in (*tiny.heads_in, tiny.heads_out))
    size, rotary = head_size(tiny.model(), tiny), model_type == "llama"
    left = {"value": [size, 0, size - 2, size] if pruned else HEADS * [size]}
    left["query_key"] = [size, 0, size - (2 if rotary else 1), size] if pruned else HEADS * [size]
    shared = 2 if rotary else 1
    values = {kind: torch.zeros(sum(counts), dtype=torch.float64) for kind, counts in left.items()}
    owners = {kind: [] for kind in left}  # For every query head's features, the key/value head's.
    for kind, counts in left.items():
        start = 0
        for count in counts:
            owners[kind] += shared * list(range(start, start + count))
            start += count
    for i in range(3):
        logits = model(**{key: value[i : i + 1] for key, value in batch.items() if key != "labels"}).logits[0]
        p = logits.softmax(0).detach()
        eigenvalues, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        for eigenvalue, vector in zip(eigenvalues.clamp_min(0), vectors.T, strict=True):
            weights = [p for module in (q, k, v) for p in (module.weight, module.bias)] + [out.weight]
            grads = torch.autograd.grad(logits @ vector * eigenvalue.sqrt(), weights, retain_graph=True)
            (qw, qb, kw, kb, vw, vb), ow = (g.reshape(len(g), -1).square().sum(1) / 3 for g in grads[:-1]), grads[-1]
            values["query_key"].index_add_(0, torch.tensor(owners["query_key"]), qw + qb)
            values["query_key"] += kw + kb
            values["value"].index_add_(0, torch.tensor(owners["value"]), ow.square().sum(0) / 3)
            values["value"] += vw + vb
    if rotary:  # The first dimensions of the pairs of a head come before the second ones.
        heads = values["query_key"].split(left["query_key"])
        values["query_key"] = torch.cat([head.view(2, -1).sum(0) for head in heads if len(head)])
    for kind, expected in values.items():
        torch.testing.assert_close(found.traces[f"{kind}_dims"][0].double(), expected, rtol=1e-5, atol=1e-10)


def test_the_refit_foreseen_is_the_one_that_comes():
    """Where contexts of a head have a dependent dimension, its removal is free, and the refit makes it so."""
    tiny = ZOO["bert"]
    model, batches = tiny.model(), make_batches(tiny, 4)
    attention = model.bert.encoder.layer[1].attention.self
    with torch.no_grad():
        attention.value.weight[1], attention.value.bias[1] = attention.value.weight[:1], attention.value.bias[:1]
    found = estimate_sensitivity(model, batches, components=["value_dims"], progress=False)
    first = found.order["value_dims"][1].argsort()[0]
    assert int(first) in (0, 1)
    assert found.scores["value_dims"][1][first] < 0.2 * found.scores["value_dims"][1].median()
    smaller = without(model, tiny, {1: {0: ([], [int(first)])}})
    before = copy.deepcopy(smaller)
    reconstruct(smaller, model, batches, progress=False)
    with torch.no_grad():
        states = [m.bert(**batches[0]).last_hidden_state for m in (model, before, smaller)]
    assert (states[2] - states[0]).norm() < 0.2 * (states[1] - states[0]).norm()
