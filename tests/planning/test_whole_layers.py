"""Whole layers as components: what removing them costs, which go, and what is left."""

import copy
import dataclasses

import pytest
import torch
from decoders import DECODERS
from seq2seq import CROSS, DECODER, ENCODER, SELF, SEQ2SEQ
from tiny import hand_made, make_batch, make_batches, make_model
from torch import nn
from zoo import HEADS, NEURONS, ZOO, logits, masked

from hap_transformers import (
    HapConfig,
    LatencyTable,
    PruningPlan,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
    tune_layers,
)
from hap_transformers.components.groups import find_groups, layers
from hap_transformers.efficiency import count_flops, count_parameters
from hap_transformers.planning.kinds import kinds_to_prune


SCORES = [3.0, 1.0, 5.0, 2.0, 4.0]
DEEP = {"num_hidden_layers": 5}


def scores(*values, method="kronecker"):
    return hand_made(method, layers=[torch.tensor([value]).double() for value in values])


def gone(model, numbers):
    """A plan of all that some layers have."""
    removed = {
        kind: {g.layer: range(g.num_components) for g in find_groups(model, [kind]) if g.layer in numbers}
        for kind in ("heads", "neurons")
    }
    return PruningPlan.for_model(model, **removed)


def test_the_default_is_block_influence():
    """One minus the cosine of what a layer reads and gives, the mean over an example's tokens without padding."""
    model, batches = make_model(**DEEP), [make_batch(6, seed=seed) for seed in range(2)]
    found = estimate_sensitivity(model, batches, components=["layers"], progress=False)
    assert found.method == "kronecker" and not found.in_loss_units and found.num_examples == 12
    influence = []
    for batch in batches:
        with torch.no_grad():
            states = torch.stack(model(**batch, output_hidden_states=True).hidden_states)
        cosines = (states[1:] * states[:-1]).sum(-1) / states[1:].norm(dim=-1) / states[:-1].norm(dim=-1)
        mask = batch["attention_mask"]
        influence.append(((1 - cosines) * mask).sum(-1) / mask.sum(-1))
    expected = torch.cat(influence, 1).mean(1)
    torch.testing.assert_close(torch.cat(found.scores["layers"]), expected, rtol=1e-5, atol=1e-7)


def with_nan(model):
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    "model, ids, settings, message",
    [
        (make_model(), 1000, {}, "The loss of batch 1, .* cannot be computed: .* Check that tokens are in the vocab"),
        (with_nan(make_model()), 5, {}, "The loss of batch 0 is nan; .* Check the weights"),
        (
            make_model(),
            5,
            {"loss_fn": lambda model, batch: model.classifier.weight.sum()},
            r"Layers \[0, 1\] of BertForSequenceClassification do not run where the loss '.*' is computed",
        ),
    ],
    ids=["vocabulary", "nan", "not run"],
)
def test_what_cannot_be_scored_by_block_influence_is_named(model, ids, settings, message):
    batches = [make_batch(), {**make_batch(), "input_ids": torch.full((3, 7), ids)}]
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(model, batches, components=["layers"], progress=False, **settings)


def test_block_influence_keeps_no_graph():
    """It takes the memory of a forward pass, and runs a loss that has no gradient."""
    graphs = []

    def loss_fn(model, batch):
        outputs = model(**batch)
        graphs.append(outputs.logits.grad_fn)
        return outputs.loss.detach()

    model = make_model()
    found = estimate_sensitivity(model, [make_batch()], components=["layers"], loss_fn=loss_fn, progress=False)
    expected = estimate_sensitivity(model, [make_batch()], components=["layers"], progress=False)
    assert graphs == [None]
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)


def test_costs_are_those_of_explicit_removals():
    """The change of the logits without a layer, in the loss's Hessian, for each example by itself."""
    model, batches = make_model("bert", num_labels=3), [make_batch(6, seed=seed) for seed in range(2)]
    found = estimate_sensitivity(model, batches, "gauss_newton_trace", components=["layers"], progress=False)
    assert found.in_loss_units and found.comparable and not found.traces
    tiny = ZOO["bert"]
    for layer in range(2):
        without = masked(model, tiny, {layer: range(HEADS)}, {layer: range(NEURONS)})
        costs = []
        for batch in batches:
            z, change = model(**batch).logits.detach(), (without(**batch).logits - model(**batch).logits).detach()
            p = z.softmax(-1)
            hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
            costs.append(torch.einsum("ik,ikl,il->i", change, hessian, change) / 2)
        torch.testing.assert_close(found.scores["layers"][layer], torch.cat(costs).mean()[None], rtol=1e-6, atol=0)


def test_costs_of_a_language_model_are_small_divergences():
    """To second order they are the KL divergence of the next tokens; a weak layer changes these little."""
    model = make_llama()
    with torch.no_grad():
        for reader in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            reader.weight.mul_(1e-3)
    ids = torch.arange(40).view(4, 10)
    method = "gauss_newton_trace"
    found = estimate_sensitivity(model, [{"input_ids": ids}], method, components=["layers"], progress=False)
    without = copy.deepcopy(model)
    apply_plan(without, gone(without, [1]))
    dense, other = (m(ids).logits[:, :-1].log_softmax(-1).detach() for m in (model, without))
    divergence = (dense.exp() * (dense - other)).sum(-1).mean()
    torch.testing.assert_close(found.scores["layers"][1].squeeze(), divergence, rtol=0.02, atol=0)
    assert found.scores["layers"][1] < min(found.scores["layers"][0], found.scores["layers"][2])


def make_llama(**sizes):
    return dataclasses.replace(ZOO["mistral"], task="ForCausalLM").model(**{"num_hidden_layers": 3, **sizes})


@pytest.mark.parametrize("method", ["fisher", "gauss_newton_trace", "gradient", "magnitude", "random"])
def test_other_methods_score_them(method):
    model, batches = make_model(**DEEP), [make_batch(6)]
    found = estimate_sensitivity(model, batches, method, components=["layers"], progress=False)
    assert [len(layer) for layer in found.scores["layers"]] == 5 * [1]
    plan = plan_pruning(found, model, ratio=0.4)
    cheapest = sorted(range(5), key=lambda i: found.scores["layers"][i].item())[:2]
    assert sorted(plan.heads) == sorted(plan.neurons) == sorted(cheapest)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"ratio": 0.2}, [1]),
        ({"ratio": 0.27}, [1]),
        ({"ratio": 0.4}, [1, 3]),  # Norms stay: without a third layer it comes nearer.
        ({"ratio": 0.4, "weigh_costs": False}, [1, 3]),
        ({"ratio": 0.05}, []),
        ({"ratio": 0.75}, [0, 1, 3, 4]),
        ({"ratio": 0.6, "budget": "layers"}, [0, 1, 3]),
        ({"ratio": 0.3, "budget": "model"}, [1, 3]),
        ({"ratio": 0.4, "budget": "flops"}, [1, 3]),
        ({"ratio": 0.4, "budget": "latency"}, [1, 3]),
    ],
    ids=str,
)
def test_the_cheapest_go_and_come_nearest(settings, expected):
    model, batch = make_model(**DEEP), ZOO["bert"].batch()
    counts, seconds = {"heads": [0, 4], "neurons": [0, 24]}, {"heads": [0.0, 4.0], "neurons": [0.0, 12.0]}
    table = LatencyTable("bert", counts=counts, seconds=seconds, outside=1.0, batch={"input_ids": [1, 8]})
    given = {"latency_table": table} if settings.get("budget") == "latency" else {"inputs": batch}
    plan = plan_pruning(scores(*SCORES), model, **settings, **given)
    assert sorted(plan.heads) == sorted(plan.neurons) == expected
    if "latency_table" in given:
        assert plan.promise["latency"] == pytest.approx(1 + 3 * 16)
        return
    before = count_parameters(model)
    apply_plan(model, plan)
    assert count_parameters(model) == plan.promise["parameters"] == before - sum(plan.saved.values())
    assert count_flops(model, batch) == plan.promise["flops"]


def test_removed_layers_are_skipped():
    dense = make_llama(**DEEP)
    model, ids = copy.deepcopy(dense), torch.arange(3, 23).view(2, 10)
    apply_plan(model, plan_pruning(scores(*SCORES), model, ratio=0.4))
    dense.model.layers = nn.ModuleList(layer for i, layer in enumerate(dense.model.layers) if i not in (1, 3))
    dense.config.num_hidden_layers = 3
    torch.testing.assert_close(model(ids).logits, dense(ids, use_cache=False).logits, rtol=0, atol=1e-10)
    found = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, dense.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize("name", ["bert", "t5", "swin", "vit", "gpt2", "deberta-v2"])
def test_all_kinds_of_layers(name, tmp_path):
    """A model whose layer is masked gives the same; so does its checkpoint, and the other layer is pruned again."""
    tiny = ZOO[name]
    dense, batch = tiny.model(), tiny.batch()
    found = estimate_sensitivity(dense, [batch], "magnitude", components=["layers"], progress=False)
    model = copy.deepcopy(dense)
    apply_plan(model, plan_pruning(found, model, budget="layers", ratio=0.5))
    (layer,) = {g.layer for g in find_groups(model) if not g.num_components}
    expected = masked(dense, tiny, {layer: range(HEADS)}, {layer: range(NEURONS)})
    torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=0, atol=1e-10)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again, tiny), logits(model, tiny), rtol=1e-12, atol=1e-12)
    assert [g.num_components for g in find_groups(again, ["layers"])].count(0) == 1
    with pytest.raises(ValueError, match="one layer stays"):
        left = [torch.ones(g.num_components).double() for g in find_groups(again, ["layers"])]
        plan_pruning(hand_made("kronecker", layers=left), again, ratio=0.9)
    kinds = kinds_to_prune(None, "kronecker", HapConfig(ratio=0.7), again)
    assert "layers" not in kinds and "neurons" in kinds
    parts = [torch.rand(g.num_components).double() for g in find_groups(again, ["neurons"])]
    apply_plan(again, plan_pruning(hand_made("kronecker", neurons=parts), again, budget="neurons", ratio=0.6))
    assert sum(g.num_components for g in find_groups(again, ["neurons"])) < sum(len(part) for part in parts)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_layer_of_a_decoder_goes_with_its_cross_attention(family):
    tiny = SEQ2SEQ[family]
    dense, batch = tiny.model(), tiny.batch()
    wanted = [torch.tensor([float(i != SELF[1])]).double() for i in range(ENCODER + DECODER)]
    model = copy.deepcopy(dense)
    apply_plan(model, plan_pruning(hand_made("kronecker", layers=wanted), model, budget="layers", ratio=0.2))
    assert {g.layer for g in find_groups(model) if not g.num_components} == {SELF[1], CROSS[1]}
    assert [g.num_components for g in find_groups(model, ["layers"])] == [
        int(i != SELF[1]) for i in range(len(wanted))
    ]
    if family == "t5":  # Nothing is left of a layer that only adds.
        dense.decoder.block = dense.decoder.block[:1]
        torch.testing.assert_close(model(**batch).logits, dense(**batch).logits, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="encoder and its decoder have layers|normalize the residual stream"):
        plan_pruning(hand_made("kronecker", layers=wanted), tiny.model(), budget="layers", ratio=0.2, uniform=True)


def test_a_layer_of_cross_attention_alone_counts_as_one():
    tiny = SEQ2SEQ["bart"]
    model, layer = tiny.model(), SELF[1]
    gone = {kind: range(g.num_components) for g in find_groups(model) if g.layer == layer for kind in [g.kind.name]}
    apply_plan(model, PruningPlan.for_model(model, **{kind: {layer: numbers} for kind, numbers in gone.items()}))
    worth = [torch.tensor([float(i != layer)]).double() for i in range(ENCODER + DECODER)]
    plan = plan_pruning(hand_made("kronecker", layers=worth), model, budget="layers", ratio=0.2)
    assert sorted(plan.heads) == [CROSS[1]] and not plan.neurons


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_and_decoder_keep_a_layer_each(family):
    """The decoder's layers are worth the least, but without them no input would matter."""
    model = SEQ2SEQ[family].model()
    worth = [torch.tensor([float(ENCODER + DECODER - i)]).double() for i in range(ENCODER + DECODER)]
    plan = plan_pruning(hand_made("kronecker", layers=worth), model, budget="layers", ratio=0.6)
    assert sorted(plan.neurons) == [1, 2, SELF[1]]
    with pytest.raises(ValueError, match="one layer stays, of the encoder and of the decoder, so at most 0.6 can go"):
        plan_pruning(hand_made("kronecker", layers=worth), model, budget="layers", ratio=0.8)


def test_tokens_of_a_decoder_count_by_their_labels():
    """As in an explicit loop over layers; labels of -100 are padding, in the encoder it is the mask that says so."""
    tiny = SEQ2SEQ["t5"]
    model, batch = tiny.model(), tiny.batch()
    found = estimate_sensitivity(model, [batch], components=["layers"], progress=False).scores["layers"]
    stacks = (model.encoder, batch["attention_mask"].bool()), (model.decoder, batch["labels"] != -100)
    seen: dict = {}
    blocks = [block for stack, _ in stacks for block in stack.block]
    handles = [
        block.register_forward_hook(lambda block, args, output: seen.update({block: (args[0], output[0])}))
        for block in blocks
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    expected = [
        torch.stack([(1 - cosine[i][row]).mean() for i, row in enumerate(valid)]).mean()
        for stack, valid in stacks
        for cosine in (torch.cosine_similarity(*seen[block], -1) for block in stack.block)
    ]
    assert not any(valid.all() for _, valid in stacks)
    torch.testing.assert_close(torch.cat(found), torch.stack(expected), rtol=1e-5, atol=1e-7)


def test_layers_of_narrower_heads():
    model, batch = make_model(**DEEP), ZOO["bert"].batch()
    apply_plan(model, PruningPlan.for_model(model, value_dims={0: [0, 5], 2: [1]}, query_key_dims={1: [3]}))
    plan = plan_pruning(scores(*SCORES), model, ratio=0.4, budget="flops", inputs=batch)
    assert sorted(plan.removed["value_dims"]) == sorted(plan.removed["query_key_dims"]) == [1, 3]
    apply_plan(model, plan)
    assert (count_parameters(model), count_flops(model, batch)) == tuple(plan.promise.values())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ratio": 0.95}, "cannot be met by whole layers: one layer stays, so at most 0.7"),
        ({"min_heads": 1}, "min_heads would keep heads in every layer, but whole layers are to go. Leave it out"),
        ({"min_neurons": 0.1}, "min_neurons would keep neurons in every layer"),
        (
            {"min_heads": 1, "min_neurons": 0.1},
            "min_heads and min_neurons would keep heads and neurons in every layer, .* Leave them out",
        ),
        ({"implant_ratio": 0.2}, "implant_ratio=0.2, but whole layers go"),
        ({"components": ["layers", "neurons"]}, "go by themselves: leave 'layers' or 'neurons' out"),
        ({"components": ["heads"], "budget": "layers"}, "budget='layers' removes layers alone"),
    ],
    ids=str,
)
def test_what_does_not_suit_is_named(settings, message):
    settings = {"components": ["layers"], **settings}
    with pytest.raises(ValueError, match=message):
        config = HapConfig(**settings)
        kinds_to_prune(config.components, config.method, config)
        del settings["components"]
        plan_pruning(scores(*SCORES), make_model(**DEEP), **settings)


def test_models_without_such_layers():
    config = HapConfig(components=["layers"])
    with pytest.raises(ValueError, match="has no layers"):
        kinds_to_prune(config.components, config.method, config, DECODERS["olmo2"].model())
    with pytest.raises(ValueError, match="has no layers"):
        estimate_sensitivity(DECODERS["olmo2"].model(), [make_batch()], components=["layers"])
    with pytest.raises(ValueError, match="some are made of others. Score them apart"):
        estimate_sensitivity(make_model(), [make_batch()], components=["layers", "neurons"])
    with pytest.raises(ValueError, match="has scores for \\[1, 1\\] layers per layer"):
        plan_pruning(scores(1.0, 2.0), make_model(**DEEP), ratio=0.2)


def test_the_reader_in_front_makes_up_for_layers():
    """Its ridge regression follows the dense model's stream behind them, and nothing before it changes."""
    dense, batches = make_llama(num_hidden_layers=4), make_batches(ZOO["mistral"], 3)
    model, seen = copy.deepcopy(dense), {}
    apply_plan(model, gone(model, [1, 2]))
    front = dense.model.layers[0].mlp.down_proj
    handles = [front.register_forward_hook(lambda module, args, output: seen.update(x=args[0], given=output))]
    for i in (1, 3):  # What comes out of layers 0 and 2.
        norm = dense.model.layers[i].input_layernorm
        handles.append(norm.register_forward_pre_hook(lambda module, args, i=i: seen.update({i - 1: args[0]})))
    xx, xr = 0, 0
    for batch in batches:
        with torch.no_grad():
            dense(**batch)
        x, added = (seen[name][batch["attention_mask"].bool()] for name in ("x", 2))
        missed = added - seen[0][batch["attention_mask"].bool()]
        xx, xr = xx + x.T @ x, xr + x.T @ missed
    for handle in handles:
        handle.remove()
    ridge = 0.01 * xx.diagonal().mean() * torch.eye(len(xx)).double()
    expected = front.weight + torch.linalg.solve(xx + ridge, xr).T
    before = copy.deepcopy(model.model.layers[0].state_dict())
    reconstruct(model, dense, batches, ridge=0.01, progress=False)
    after = model.model.layers[0].state_dict()
    torch.testing.assert_close(after["mlp.down_proj.weight"], expected, rtol=1e-6, atol=1e-9)
    others = [name for name in before if name != "mlp.down_proj.weight"]
    for name in others:
        torch.testing.assert_close(after[name], before[name], rtol=1e-8, atol=1e-10)
    assert layers(model)[1].mlp.down_proj.in_features == 0


def test_tuning_keeps_what_the_reader_in_front_makes_up_for():
    tiny = ZOO["mistral"]
    dense, batches = tiny.model(num_hidden_layers=3), make_batches(tiny, 3)
    model = copy.deepcopy(dense)
    apply_plan(model, gone(model, [1]))

    def missed():
        """How far the first layer is from the dense model's second."""
        found, wanted = (m(**batches[0], output_hidden_states=True).hidden_states for m in (model, dense))
        return (found[1] - wanted[2])[batches[0]["attention_mask"].bool()].square().mean().item()

    reconstruct(model, dense, batches, progress=False)
    before = missed()
    tune_layers(model, dense, batches, epochs=10, learning_rate=1e-3, progress=False)
    assert missed() < before
