"""Kronecker factors against derivatives of single examples, and what becomes of them."""

import copy

import pytest
import torch
from conftest import make_batch, make_model
from scipy.stats import spearmanr
from zoo import HEADS, LAYERS, ZOO

from hap_transformers import PruningPlan, apply_plan, estimate_sensitivity
from hap_transformers.components.groups import attention_blocks, feed_forward_blocks
from hap_transformers.sensitivity.surgeon import removal_costs


def kronecker_scores(model, batches, **arguments):
    return estimate_sensitivity(model, batches, "kronecker", progress=False, **arguments)


def explicit_factors(model, batch, module):
    """A from the inputs of valid tokens, C from each example's own Jacobian times a square root of diag p - p p^T."""
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    handle.remove()
    tokens = torch.cat([inputs for inputs, _ in seen]).detach()
    mask = batch.get("attention_mask")
    tokens = tokens.flatten(0, 1) if mask is None else tokens[mask.repeat(len(seen), 1).bool()]
    cotangents = 0
    for i, own in enumerate(logits):
        p = own.softmax(0).detach()
        values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        for value, vector in zip(values.clamp_min(0), vectors.T, strict=True):
            for g in torch.autograd.grad(own @ vector * value.sqrt(), [out for _, out in seen], retain_graph=True):
                cotangents = cotangents + g[i].T @ g[i] / len(logits)
    centred = tokens - tokens.mean(0) if module.bias is not None else tokens
    return centred.T @ centred / len(tokens), cotangents


def test_costs_equal_those_of_explicit_factors(model_type):
    if model_type == "t5-gated":
        pytest.skip("a language model, whose labels are other than the classifiers'")
    tiny = ZOO[model_type]
    model, batch = tiny.model(), tiny.batch(6)
    batch["labels"] = torch.arange(6) % 2
    result = kronecker_scores(model, [batch])
    for blocks, scores, orders in (
        (attention_blocks(model), result.heads, result.head_order),
        (feed_forward_blocks(model), result.neurons, result.neuron_order),
    ):
        for block, score, order in zip(blocks, scores, orders, strict=True):
            moment, cotangents = explicit_factors(model, batch, block.output.module)
            weight = block.output.matrix(block.output.module.weight).detach()
            size = block.output.in_features // block.num_components
            expected, costs = removal_costs(moment, weight.T @ cotangents @ weight, size)
            assert torch.argsort(order).tolist() == expected.tolist()
            torch.testing.assert_close(score[expected], costs.cummax(0).values, rtol=1e-6, atol=1e-12)


def test_batches_and_padding_do_not_matter():
    model, batch = make_model(), make_batch(6)
    whole = kronecker_scores(model, [batch])
    longer = {k: torch.nn.functional.pad(v, (0, 4)) if v.ndim == 2 else v for k, v in batch.items()}
    parts = [{name: tensor[i : i + 2] for name, tensor in longer.items()} for i in (0, 2, 4)]
    split = kronecker_scores(model, parts)
    for first, second in zip(whole.heads + whole.neurons, split.heads + split.neurons, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-12)
    assert split.num_examples == 6 and split.reliability is not None and split.head_traces is None


def test_goes_on_where_it_was_interrupted(tmp_path):
    model, batches = make_model(), [make_batch(seed=seed) for seed in range(3)]

    def broken():
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kronecker_scores(model, broken(), state_file=tmp_path / "state")
    resumed = kronecker_scores(model, batches, state_file=tmp_path / "state")
    for first, second in zip(resumed.neurons, kronecker_scores(model, batches).neurons, strict=True):
        assert torch.equal(first, second)


def test_blocks_without_components():
    model = make_model()
    apply_plan(model, PruningPlan.for_model(model, heads={0: range(HEADS)}, neurons={1: range(24)}))
    result = kronecker_scores(model, [make_batch()])
    assert [len(order) for order in result.head_order] == [0, HEADS]
    assert [len(order) for order in result.neuron_order] == [24, 0]
    assert len(kronecker_scores(make_model(), [make_batch()], components=("heads",)).heads) == LAYERS
    assert kronecker_scores(make_model(), [make_batch()], components=("heads",)).neuron_order is None


def test_low_precision_orders_alike():
    model = make_model(dtype=torch.float32)
    batches = [make_batch(8, seed=seed) for seed in range(4)]
    exact, low = kronecker_scores(copy.deepcopy(model), batches), kronecker_scores(model, batches, precision="bf16")
    for first, second in zip(exact.neurons, low.neurons, strict=True):
        assert spearmanr(first, second).statistic > 0.95


@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_is_free_only_where_there_is_a_bias(bias):
    """A neuron that always gives the same: a bias takes its place, nothing else does."""
    model, batch = make_model(), make_batch(16)
    output = model.bert.encoder.layer[0].output.dense
    if not bias:
        output.register_parameter("bias", None)
    output.register_forward_pre_hook(
        lambda module, args: (torch.cat([torch.full_like(args[0][..., :1], 5.0), args[0][..., 1:]], -1),),
        prepend=True,
    )
    order = kronecker_scores(model, [batch]).neuron_order[0]
    assert (order[0] == 0) == bias
