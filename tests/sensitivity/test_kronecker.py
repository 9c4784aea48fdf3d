"""Costs equal those of explicit Kronecker factors, from derivatives of single examples."""

import copy

import pytest
import torch
from explicit import explicit_factors
from scipy.stats import spearmanr
from tiny import make_batch, make_model
from zoo import HEADS, LAYERS, NORM_FIRST, ZOO

from hap_transformers import PruningPlan, apply_plan, estimate_sensitivity
from hap_transformers.components.groups import find_groups
from hap_transformers.sensitivity.surgeon import removal_costs


def kronecker_scores(model, batches, **arguments):
    return estimate_sensitivity(model, batches, "kronecker", progress=False, **arguments)


def test_costs_equal_those_of_explicit_factors(model_type):
    if model_type == "t5-gated":
        pytest.skip("a language model, whose labels are other than the classifiers'")
    tiny = ZOO[model_type]
    model, batch = tiny.model(), tiny.batch(6)
    batch["labels"] = torch.arange(6) % 2
    result = kronecker_scores(model, [batch])
    for groups, scores, orders in (
        (find_groups(model, ["heads"]), result.heads, result.order["heads"]),
        (find_groups(model, ["neurons"]), result.neurons, result.order["neurons"]),
    ):
        for group, score, order in zip(groups, scores, orders, strict=True):
            moment, cotangents = explicit_factors(model, batch, group.reader.module)
            weight = group.reader.matrix(group.reader.module.weight).detach()
            size = group.reader.in_features // group.num_components
            by_input = model_type in NORM_FIRST
            expected, costs = removal_costs(moment, weight.T @ cotangents @ weight, size, by_input=by_input)
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
    assert split.num_examples == 6 and split.reliability is not None and not split.traces


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
    assert [len(order) for order in result.order["heads"]] == [0, HEADS]
    assert [len(order) for order in result.order["neurons"]] == [24, 0]
    assert len(kronecker_scores(make_model(), [make_batch()], components=("heads",)).heads) == LAYERS
    assert kronecker_scores(make_model(), [make_batch()], components=("heads",)).order.keys() == {"heads"}


def test_low_precision_orders_alike():
    model = make_model(dtype=torch.float32)
    batches = [make_batch(8, seed=seed) for seed in range(4)]
    exact, low = kronecker_scores(copy.deepcopy(model), batches), kronecker_scores(model, batches, precision="bf16")
    for first, second in zip(exact.neurons, low.neurons, strict=True):
        assert spearmanr(first, second).statistic > 0.95


@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_is_free_only_where_there_is_a_bias(bias):
    """A bias can replace a constant neuron, and nothing else can."""
    model, batch = make_model(), make_batch(16)
    output = model.bert.encoder.layer[0].output.dense
    if not bias:
        output.register_parameter("bias", None)
    output.register_forward_pre_hook(
        lambda module, args: (torch.cat([torch.full_like(args[0][..., :1], 5.0), args[0][..., 1:]], -1),),
        prepend=True,
    )
    order = kronecker_scores(model, [batch]).order["neurons"][0]
    assert (order[0] == 0) == bias


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("model_type", ["bert", "albert"])
def test_chunks_of_tokens_do_not_matter(model_type, size):
    """Padding does not count, though a chunk has not the mask's shape. ALBERT calls a block once a layer."""
    batch = make_batch(size=16, length=6)
    batch["attention_mask"][::2, 2:] = 0
    scores = [
        estimate_sensitivity(make_model(model_type, chunk_size_feed_forward=chunk), [batch], progress=False)
        for chunk in (0, size)
    ]
    for whole, chunked in zip(*(found.neurons for found in scores), strict=True):
        torch.testing.assert_close(chunked, whole)
