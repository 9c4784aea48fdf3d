"""`budget="model"`: a share of all parameters, in one ranking of all kinds on one scale of costs."""

import copy
import dataclasses

import pytest
import torch
from tiny import DIMENSIONS, make_batches, make_model
from zoo import ZOO

from hap_transformers import (
    HapConfig,
    PlanningSettings,
    SelfLoss,
    align_embeddings,
    align_heads,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
)
from hap_transformers.components.groups import find_groups
from hap_transformers.efficiency import count_flops, count_parameters
from hap_transformers.planning.kinds import kinds_to_prune


KINDS = ("embedding_dims", *DIMENSIONS)


@pytest.fixture(scope="module")
def scored():
    """A model with more tokens than others, aligned, and its scores."""
    model = make_model(vocab_size=400)
    dense, batches = count_parameters(model), make_batches(ZOO["bert"], 4)
    align_heads(model, batches, progress=False)
    align_embeddings(model, batches, progress=False)
    return model, estimate_sensitivity(model, batches, components=KINDS, progress=False), dense


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_promise_is_what_is_left(scored, ratio):
    model, sensitivity, dense = scored
    plan = plan_pruning(sensitivity, model, budget="model", ratio=ratio, inputs=ZOO["bert"].batch())
    pruned = copy.deepcopy(model)
    apply_plan(pruned, plan)
    left = count_parameters(pruned)
    assert left == plan.promise["parameters"] <= (1 - ratio) * dense
    assert sum(plan.saved.values()) == dense - left
    assert count_flops(pruned, ZOO["bert"].batch()) == plan.promise["flops"]
    assert all(f"({saved:,} parameters)" in repr(plan) for saved in plan.saved.values())
    # Of the rest, no more than one step went too far.
    assert left >= (1 - ratio) * dense - max(8 * 416, 2 * 16 * 16 + 64)


def test_pruned_twice(scored):
    """What went before counts."""
    model, sensitivity, dense = scored
    pruned = copy.deepcopy(model)
    apply_plan(pruned, plan_pruning(sensitivity, pruned, budget="model", ratio=0.5))
    batches = make_batches(ZOO["bert"], 4)
    align_embeddings(pruned, batches, progress=False)
    again = estimate_sensitivity(pruned, batches, components=KINDS, progress=False)
    plan = plan_pruning(again, pruned, budget="model", ratio=0.7)
    apply_plan(pruned, plan)
    assert count_parameters(pruned) == plan.promise["parameters"] <= 0.3 * dense


def test_no_rank_is_left_that_takes_more_than_the_dense_table():
    """With 20 tokens of 16 dimensions, ranks from 9 on do."""
    model = make_model(vocab_size=20)
    batches = [{k: v % 20 if k == "input_ids" else v for k, v in b.items()} for b in make_batches(ZOO["bert"], 2)]
    dense = count_parameters(model)
    align_embeddings(model, batches, progress=False)
    sensitivity = estimate_sensitivity(model, batches, components=["embedding_dims", "neurons"], progress=False)
    ranks = set()
    for ratio in (0.05, 0.1, 0.2, 0.3, 0.35):
        pruned = copy.deepcopy(model)
        plan = plan_pruning(sensitivity, pruned, budget="model", ratio=ratio)
        apply_plan(pruned, plan)
        assert count_parameters(pruned) == plan.promise["parameters"] <= (1 - ratio) * dense
        ranks.add(pruned.get_input_embeddings().weight.shape[1])
    assert ranks <= {16, 8, 0} and len(ranks) > 1


class Nothing(torch.nn.Module):
    """In the place of a norm."""

    def forward(self, states):
        return states


def nearly_linear():
    """An encoder without norms, whose neurons add little: all tokens have nearly the same curvature."""
    model = dataclasses.replace(ZOO["bert"], task="Model").model(torch.float64, num_hidden_layers=1)
    model.embeddings.LayerNorm = Nothing()
    layer = model.encoder.layer[0]
    layer.attention.output.LayerNorm, layer.output.LayerNorm = Nothing(), Nothing()
    layer.output.dense.weight.data *= 0.02
    return model


LOSS = SelfLoss(pooling="cls", normalize=False)


@torch.no_grad()
def change(model, batches, module, weight, bias=None):
    """How far the self loss of a model rises when a module gets another weight and bias."""
    before = [model(**batch).last_hidden_state for batch in batches]
    changed = copy.deepcopy(model)
    moved = changed.get_submodule(next(name for name, other in model.named_modules() if other is module))
    moved.weight.copy_(weight)
    if bias is not None:
        moved.bias.copy_(bias)
    after = [changed(**batch).last_hidden_state for batch in batches]
    return torch.cat([(x - y)[:, 0].square().sum(1) for x, y in zip(before, after, strict=True)]).mean()


@torch.no_grad()
def refitted(group, gone, inputs):
    """The weight and bias of a reader without some inputs, whose others are refitted by least squares."""
    W, b, mean = group.reader.module.weight, group.reader.module.bias, inputs.mean(0)
    A = (inputs - mean).T @ (inputs - mean) / len(inputs)
    A = A + 0.01 * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)
    kept = [i for i in range(len(A)) if i not in gone]
    W_new = torch.zeros_like(W)
    if kept:
        W_new[:, kept] = W[:, kept] + W[:, gone] @ torch.linalg.solve(A[kept][:, kept], A[kept][:, gone]).T
    return W_new, b + (W - W_new) @ mean


def test_costs_of_all_kinds_are_changes_of_the_loss():
    """Embeddings without some dimensions, and neurons gone with a refit of the others, each on one token a text."""
    model, generator = nearly_linear(), torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 40, (100, 1), generator=generator)} for _ in range(2)]
    passes = {"num_probes": 64, "progress": False, "loss_fn": LOSS}
    align_embeddings(model, batches, **passes)
    sensitivity = estimate_sensitivity(model, batches, components=["embedding_dims", "neurons"], **passes)
    table = model.get_input_embeddings()
    (group,) = find_groups(model, ["neurons"])
    read = []
    handle = group.reader.module.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    for batch in batches:
        model(**batch)
    handle.remove()
    for count, neurons in ((4, 21), (12, 24)):
        gone = sensitivity.order["embedding_dims"][0].argsort()[:count]
        weight = table.weight.data.clone()
        weight[:, gone] = 0
        predicted = sensitivity.scores["embedding_dims"][0][gone].sum()
        torch.testing.assert_close(predicted, change(model, batches, table, weight), rtol=0.1, atol=0)
        gone = sensitivity.order["neurons"][0].argsort()[:neurons].tolist()
        weight, bias = refitted(group, gone, torch.cat(read).flatten(0, 1))
        predicted = sensitivity.scores["neurons"][0][gone].sum()
        torch.testing.assert_close(
            predicted, change(model, batches, group.reader.module, weight, bias), rtol=0.1, atol=0
        )


def test_kinds_by_default():
    bert, tied = make_model(dtype=torch.float32), dataclasses.replace(ZOO["bert"], task="ForMaskedLM").model()
    of_model = PlanningSettings(budget="model")
    assert kinds_to_prune(None, "kronecker", of_model, bert) == KINDS
    assert kinds_to_prune(None, "kronecker", of_model, tied) == tuple(DIMENSIONS)
    assert kinds_to_prune(None, "kronecker", PlanningSettings(), bert) == tuple(DIMENSIONS)
    assert kinds_to_prune(None, "gradient", of_model, bert) == ("heads", "neurons")
    llama = ZOO["llama"].model(torch.float32)
    assert kinds_to_prune(None, "kronecker", of_model, llama) == ("embedding_dims", "heads", "neurons")
    with pytest.raises(ValueError, match="embedding_dims of this BertForMaskedLM must stay: .* shares its weights"):
        kinds_to_prune(KINDS, "kronecker", of_model, tied)


@pytest.mark.parametrize("budget", ["params", "flops", "latency"])
def test_budgets_of_the_layers_refuse_embeddings(budget):
    with pytest.raises(ValueError, match=f"budget='{budget}' is about the layers, where embedding_dims save nothing"):
        HapConfig(components=["embedding_dims", "neurons"], budget=budget)


def test_scores_need_an_aligned_model():
    with pytest.raises(ValueError, match="align_embeddings"):
        estimate_sensitivity(make_model(), make_batches(ZOO["bert"], 1), components=["embedding_dims"], progress=False)
