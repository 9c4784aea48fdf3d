"""What query/key dimensions cost, against explicit derivatives in masks on queries."""

from itertools import combinations

import pytest
import torch
from dims import ALL, left_of, query_keys_of_head, without
from tiny import make_batch
from torch import nn
from zoo import HEADS, LAYERS, ZOO

from hap_transformers import estimate_sensitivity
from hap_transformers.components.groups import find_groups
from hap_transformers.sensitivity.mask_costs import costs_without_refit


# Paths of what is multiplied by masks: one factor of every product of a query and a key. DeBERTa also multiplies
# queries of relative positions.
MASKED = {
    "bert": ["bert.encoder.layer.{}.attention.self.query"],
    "deberta-v2": [f"deberta.encoder.layer.{{}}.attention.self.{name}" for name in ("query_proj", "pos_query_proj")],
    "deberta-v3": ["deberta.encoder.layer.{}.attention.self.query_proj"],
    "gpt2": ["transformer.h.{}.attn.c_attn"],
    "llama": ["model.layers.{}.self_attn.q_proj"],
    "mistral": ["model.layers.{}.self_attn.q_proj"],
    "modernbert": ["model.layers.{}.attn.Wqkv"],
    "qwen3": ["model.layers.{}.self_attn.q_norm"],
    "t5": ["transformer.encoder.block.{}.layer.0.SelfAttention.q"],
}


def random_matrices(maps, masks, seed=0):
    roots = torch.randn(maps, masks, masks + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return roots @ roots.mT


def test_each_step_takes_the_mask_that_adds_least():
    F = random_matrices(3, 6)
    orders, costs = costs_without_refit(F)
    for curvature, order, cost in zip(F, orders.tolist(), costs, strict=True):
        gone, before = [], 0.0
        for mask, added in zip(order, cost.tolist(), strict=True):
            after = {m: float(curvature[gone + [m]][:, gone + [m]].sum() / 2) for m in set(range(6)) - set(gone)}
            assert min(after, key=after.get) == mask and after[mask] - before == pytest.approx(added, abs=1e-9)
            gone, before = [*gone, mask], after[mask]
        assert float(cost.sum()) == pytest.approx(float(curvature.sum() / 2))


def test_greedy_is_the_best_order_of_masks_that_do_not_interact():
    F = random_matrices(1, 6).diagonal(dim1=1, dim2=2).diag_embed()
    order, costs = costs_without_refit(F)
    best = [min(sum(F[0, m, m] / 2 for m in chosen) for chosen in combinations(range(6), n)) for n in range(1, 7)]
    torch.testing.assert_close(costs[0].cumsum(0), torch.stack(best))
    assert order[0].tolist() == F[0].diagonal().argsort().tolist()


def explicit_matrix(model, batch, paths, spread):
    """mean_i sum_k of products of derivatives of s_k . z_i in masks of single examples.

    Args:
        paths: Of the modules whose outputs are multiplied.
        spread: Takes the masks, gives a factor for every feature of a token.
    """
    count = spread(None)
    found = torch.zeros(count, count, dtype=torch.float64)
    for i in range(len(batch["labels"])):
        masks = torch.ones(count, dtype=torch.float64, requires_grad=True)
        handles = [
            model.get_submodule(path).register_forward_hook(
                lambda m, args, output, masks=masks: (
                    (output.flatten(2) * spread(masks)).view_as(output) if output.ndim > 3 else output * spread(masks)
                )
            )
            for path in paths
        ]
        example = {name: value[i : i + 1] for name, value in batch.items() if name != "labels"}
        logits = model(**example).logits[0]
        for handle in handles:
            handle.remove()
        p = logits.softmax(0).detach()
        values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        for value, vector in zip(values.clamp_min(0), vectors.T, strict=True):
            (g,) = torch.autograd.grad(logits @ vector * value.sqrt(), masks, retain_graph=True)
            found += torch.outer(g, g) / len(batch["labels"])
    return found


def assert_costs(scores, order, costs, model_type="bert"):
    """Whether scores in the order of removal are running maxima of costs."""
    expected = costs.cummax(0).values
    # DeBERTa's loss is of logits in float32, whatever the model's are.
    rounding = 1e-6 if model_type.startswith("deberta") else 1e-9
    torch.testing.assert_close(scores[order], expected, rtol=1e-5, atol=rounding * float(expected[-1]))


def spreader(model_type, model, layer):
    """How masks lie over what the query projection gives: of fused ones, keys and values have the factor 1."""
    width = find_groups(model, ["query_key_dims"])[layer].writers[0].out_features
    shared = model.config.num_attention_heads // HEADS
    size = width // HEADS // shared
    own = query_keys_of_head(model, size)
    places = [head * own + dim % own for head in range(HEADS) for _ in range(shared) for dim in range(size)]
    others = {"gpt2": 2 * width, "modernbert": 2 * width}.get(model_type, 0)

    def spread(masks):
        if masks is None:
            return HEADS * own
        return torch.cat([masks[places], masks.new_ones(others)])

    return spread


@pytest.mark.parametrize("model_type", MASKED)
def test_costs_are_those_of_explicit_masks(model_type):
    tiny = ZOO[model_type]
    model, batch = tiny.model(), tiny.batch(4)
    batch["labels"] = torch.arange(4) % 2
    found = estimate_sensitivity(model, [batch], components=["query_key_dims"], progress=False)
    for layer in range(LAYERS):
        paths = [path.format(layer) for path in MASKED[model_type]]
        F = explicit_matrix(model, batch, paths, spreader(model_type, model, layer))
        assert F.diagonal().max() > 1e-10
        order, costs = costs_without_refit(F[None])
        scores, places = found.scores["query_key_dims"][layer], found.order["query_key_dims"][layer]
        assert places.argsort().tolist() == order[0].tolist()
        assert_costs(scores, order[0], costs[0], model_type)


def test_batches_and_padding_do_not_matter():
    model, batch = ZOO["deberta-v2"].model(), make_batch(6)
    longer = {k: nn.functional.pad(v, (0, 4)) if v.ndim == 2 else v for k, v in batch.items()}
    parts = [{name: tensor[i : i + 2] for name, tensor in longer.items()} for i in (0, 2, 4)]
    whole, split = (
        estimate_sensitivity(model, batches, components=["query_key_dims"], progress=False)
        for batches in ([batch], parts)
    )
    torch.testing.assert_close(whole.scores, split.scores, rtol=1e-6, atol=1e-15)


# The second head is gone, the third has lost all query/key dimensions, the last one some. What every component of the
# first and of the last head consists of; dimensions that are no pairs are then the first of their head.
LEFT = {
    "bert": ([[0], [1], [2], [3]], [[0], [1]]),
    "llama": ([[0, 2], [1, 3]], [[1, 3]]),
    "mistral": ([[0, 3], [1, 4], [2, 5]], [[1, 4]]),
    "qwen3": ([range(6)], [range(6)]),
}


@pytest.mark.parametrize("model_type", LEFT)
def test_costs_of_what_is_left(model_type):
    """Where some dimensions are gone: the masks are those of the others."""
    tiny = ZOO[model_type]
    model, batch = tiny.model(), {**tiny.batch(4), "labels": torch.arange(4) % 2}
    smaller = without(model, tiny, {0: {1: (ALL, ALL), 2: (ALL, []), 3: ([0, 2], [1])}})
    found = estimate_sensitivity(smaller, [batch], components=["query_key_dims"], progress=False)
    first, last = LEFT[model_type]
    assert left_of(find_groups(smaller, ["query_key_dims"])[0]) == [len(first), 0, 0, len(last)]
    size, shared = getattr(model.config, "head_dim", 4), model.config.num_attention_heads // HEADS
    # What the query projection gives of three heads: zeros in the places of what is gone.
    heads = [(0, dims) for dims in first] + [(2, dims) for dims in last]
    places = [[(head * shared + i) * size + dim for i in range(shared) for dim in dims] for head, dims in heads]

    def spread(masks):
        if masks is None:
            return len(places)
        factors = list(torch.ones(3 * shared * size, dtype=torch.float64))
        for mask, own in zip(masks, places, strict=True):
            for place in own:
                factors[place] = mask
        return torch.stack(factors)

    F = explicit_matrix(smaller, batch, [MASKED[model_type][0].format(0)], spread)
    order, costs = costs_without_refit(F[None])
    scores = found.scores["query_key_dims"][0]
    assert_costs(scores, order[0], costs[0])
