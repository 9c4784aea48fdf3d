"""Refits equal NumPy's least squares, and restore the dense model where nothing was lost."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import make_batches, make_model
from zoo import ALL_HEADS, ALL_NEURONS, ZOO

from hap_transformers import PruningPlan, apply_plan, reconstruct
from hap_transformers.components.groups import find_groups


def pruned(model, **plan):
    smaller = copy.deepcopy(model)
    apply_plan(smaller, PruningPlan.for_model(smaller, **plan))
    return smaller


def test_what_others_can_make_up_for_is_restored(model_type):
    """Head 1 and neuron 1 duplicate head 0 and neuron 0, so nothing is lost with them."""
    tiny = ZOO[model_type]
    dense, batches = tiny.model(), make_batches(tiny)
    for group in (find_groups(dense, ["heads"])[0], find_groups(dense, ["neurons"])[0]):
        for projection in (*group.writers, *group.followers):
            rows = projection.out_features // group.num_components
            for parameter in projection.parameters:
                table = (
                    projection.matrix(parameter.data) if parameter.ndim == 2 else projection.outputs_of(parameter.data)
                )
                table[rows : 2 * rows] = table[:rows].clone()
    # In these, heads also differ in their position bias.
    heads = {} if tiny.family in ("Beit", "MPNet", "Swin", "T5") else {0: [1]}
    smaller = pruned(dense, heads=heads, neurons={0: [1]})
    expected = dense(**batches[0]).logits
    lost = (smaller(**batches[0]).logits - expected).abs().max()
    reconstruct(smaller, dense, batches, ridge=0, progress=False)
    # Later calls of ALBERT's shared layers read what earlier calls lost before the refit.
    tolerance = 0.01 * lost.item() if model_type == "albert" else 1e-6
    torch.testing.assert_close(smaller(**batches[0]).logits, expected, rtol=0, atol=tolerance)
    assert lost > 1e-3


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_equals_least_squares(ridge):
    """The first pruned block equals `numpy.linalg.lstsq` with the ridge as further rows."""
    dense, batches = make_model(), make_batches(ZOO["bert"])
    smaller = pruned(dense, heads={0: [1]})
    seen = {}
    for name, model in (("dense", dense), ("smaller", smaller)):
        module, rows = model.bert.encoder.layer[0].attention.output.dense, []
        handle = module.register_forward_hook(lambda m, args, out, rows=rows: rows.append((args[0], out)))
        for batch in batches:
            model(**batch)
        handle.remove()
        mask = torch.cat([batch["attention_mask"] for batch in batches]).bool()
        seen[name] = [torch.cat(tensors)[mask].detach().numpy() for tensors in zip(*rows, strict=True)]
    x, y = seen["smaller"][0], seen["dense"][1]
    module = smaller.bert.encoder.layer[0].attention.output.dense
    before = module.weight.detach().numpy().copy()
    centred = x - x.mean(0)
    root = np.sqrt(ridge * (centred**2).sum(0).mean())
    rows = np.vstack([centred, root * np.eye(x.shape[1])])
    weight = np.linalg.lstsq(rows, np.vstack([y - y.mean(0), root * before.T]), rcond=None)[0].T
    reconstruct(smaller, dense, batches, ridge=ridge, progress=False)
    np.testing.assert_allclose(module.weight.detach().numpy(), weight, rtol=0, atol=1e-9)
    np.testing.assert_allclose(module.bias.detach().numpy(), y.mean(0) - weight @ x.mean(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("model_type", "expected"), [("bert", 0.01), ("t5-gated", 0.01), ("gpt2", 0.01), ("llama", 1.0)]
)
def test_the_ridge_suits_the_model(model_type, expected):
    """Without one, that of classifiers and encoders, or of causal language models."""
    tiny = ZOO[model_type]
    if expected == 1.0:
        tiny = dataclasses.replace(tiny, task="ForCausalLM")
    dense = tiny.model()
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in make_batches(tiny, 2)]
    one, two = (pruned(dense, heads={0: [1]}) for _ in range(2))
    reconstruct(one, dense, batches, progress=False)
    reconstruct(two, dense, batches, ridge=expected, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    reconstruct(two, dense, batches, ridge=3 * expected, progress=False)
    assert not all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def inputs_of(model, path, batches):
    """What a module reads of all tokens that count, in NumPy."""
    read = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for batch in batches:
        model(**batch)
    handle.remove()
    mask = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    return torch.cat(read)[mask].detach().numpy()


@pytest.mark.parametrize("kinds", ["heads", "dimensions"])
def test_what_blocks_read_by_equals_least_squares(kinds):
    """On what the pruned block reads, its projections give what they gave on what the dense block reads."""
    dense, batches = make_model(), make_batches(ZOO["bert"])
    dims = {0: [1, 2], 1: [0, 5]}
    gone = {"heads": {0: [1], 1: [2]}} if kinds == "heads" else {"value_dims": dims, "query_key_dims": dims}
    smaller = pruned(dense, **gone, neurons={0: range(9), 1: [3]})
    before = copy.deepcopy(smaller)
    reconstruct(smaller, dense, batches, ridge=0.01, progress=False)
    changed = []
    for path in ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"):
        path = f"bert.encoder.layer.1.{path}"
        x, wanted = (inputs_of(model, path, batches) for model in (smaller, dense))
        old, new = before.get_submodule(path), smaller.get_submodule(path)
        weight, bias = old.weight.detach().numpy(), old.bias.detach().numpy()
        y = wanted @ weight.T + bias
        centred = x - x.mean(0)
        root = np.sqrt(0.01 * (centred**2).sum(0).mean())
        rows = np.vstack([centred, root * np.eye(x.shape[1])])
        fitted = np.linalg.lstsq(rows, np.vstack([y - y.mean(0), root * weight.T]), rcond=None)[0].T
        np.testing.assert_allclose(new.weight.detach().numpy(), fitted, rtol=0, atol=1e-9)
        np.testing.assert_allclose(new.bias.detach().numpy(), y.mean(0) - fitted @ x.mean(0), rtol=0, atol=1e-9)
        changed.append(np.abs(fitted - weight).max())
    assert min(changed) > 1e-3


def test_what_reads_positions_too_stays():
    """DeBERTa's query and key projections may also read embeddings of positions."""
    tiny = ZOO["deberta-v3"]
    dense, batches = tiny.model(), make_batches(tiny)
    smaller = pruned(dense, heads={0: [1]}, neurons={0: range(9)})
    before = copy.deepcopy(smaller.state_dict())
    reconstruct(smaller, dense, batches, progress=False)
    same = {name for name, tensor in smaller.state_dict().items() if torch.equal(tensor, before[name])}
    layer = "deberta.encoder.layer.1.attention.self"
    assert {f"{layer}.query_proj.weight", f"{layer}.key_proj.weight"} <= same
    assert f"{layer}.value_proj.weight" not in same


# Modules that read the residual stream after the last layer.
STREAMS = {"bert": "bert.encoder.layer.1.output.LayerNorm", "gpt2": "transformer.ln_f", "vit": "vit.layernorm"}


@pytest.mark.parametrize("model_type", STREAMS)
def test_the_stream_is_as_near_as_it_can_be(model_type):
    """After the refit, no change of the last projection brings the residual stream closer to the dense one."""
    tiny = ZOO[model_type]
    dense, batches = tiny.model(), make_batches(tiny)
    smaller = pruned(dense, heads={0: [1], 1: ALL_HEADS}, neurons={0: ALL_NEURONS, 1: [0, 5]})
    last = find_groups(smaller, ["neurons"])[1].reader.module

    def distance():
        streams = []
        for model in (dense, smaller):
            handle = model.get_submodule(STREAMS[model_type]).register_forward_pre_hook(
                lambda m, args: streams[-1].append(args[0])
            )
            streams.append([])
            for batch in batches:
                model(**batch)
            handle.remove()
        squares = (torch.cat(streams[0]) - torch.cat(streams[1])).square().sum(2)
        if "attention_mask" in batches[0]:
            squares = squares * torch.cat([batch["attention_mask"] for batch in batches])
        loss = squares.sum()
        return loss.item(), torch.autograd.grad(loss, [last.weight, last.bias])

    before, _ = distance()
    reconstruct(smaller, dense, batches, ridge=0, progress=False)
    after, gradients = distance()
    assert after < 0.9 * before
    assert all(gradient.abs().max() < 1e-8 * after for gradient in gradients)


def test_the_stream_of_a_decoder_has_what_it_reads_of_the_encoder():
    """No other last projection brings GPT-2's residual stream closer to the dense one."""
    tiny = dataclasses.replace(ZOO["gpt2"], task="LMHeadModel")
    dense, generator = tiny.model(add_cross_attention=True, is_decoder=True), torch.Generator().manual_seed(0)
    states = [torch.randn(8, 5, 16, generator=generator, dtype=torch.float64) for _ in range(4)]
    batches = [
        {**part, "encoder_hidden_states": other} for part, other in zip(make_batches(tiny), states, strict=False)
    ]
    smaller = pruned(dense, heads={0: [1, 2]}, neurons={0: range(8)})
    reconstruct(smaller, dense, batches, ridge=0, progress=False)
    last = smaller.transformer.h[0].mlp.c_proj
    streams = []
    for model in (dense, smaller):
        handle = model.transformer.h[1].register_forward_pre_hook(lambda module, args: streams.append(args[0]))
        for batch in batches:
            model(**batch)
        handle.remove()
    counted = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    wanted, found = (torch.cat(part)[counted] for part in (streams[: len(batches)], streams[len(batches) :]))
    loss = (wanted - found).square().sum()
    assert all(g.abs().max() < 1e-8 * loss for g in torch.autograd.grad(loss, [last.weight, last.bias]))


def test_padding_does_not_count():
    dense, batches = make_model(), make_batches(ZOO["bert"])
    longer = [{name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()} for batch in batches]
    refitted = []
    for given in (batches, longer):
        smaller = pruned(dense, heads={0: [1]}, neurons={1: [0, 1]})
        reconstruct(smaller, dense, given, progress=False, accelerator=Accelerator(cpu=True))
        refitted.append(smaller.state_dict())
    for name, tensor in refitted[0].items():
        torch.testing.assert_close(tensor, refitted[1][name], rtol=0, atol=1e-10)


def test_blocks_before_the_first_pruned_one_stay():
    dense, batches = make_model(), make_batches(ZOO["bert"])
    smaller = pruned(dense, neurons={0: [0, 1]})
    reconstruct(smaller, dense, batches, progress=False)
    first, original = (model.bert.encoder.layer[0].attention.output.dense for model in (smaller, dense))
    second, of_dense = (model.bert.encoder.layer[1].attention.output.dense for model in (smaller, dense))
    assert torch.equal(first.weight, original.weight) and not torch.equal(second.weight, of_dense.weight)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in smaller.modules())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ridge": -1.0}, "must not be negative"),
        ({"batches": []}, "No tokens to refit on"),
        ({"dense": ZOO["bert"].model(num_hidden_layers=3)}, "different layers"),
    ],
    ids=str,
)
def test_bad_input_changes_nothing(change, message):
    dense = make_model()
    smaller = pruned(dense, heads={0: [1]})
    before = copy.deepcopy(smaller.state_dict())
    call = {"model": smaller, "dense": dense, "batches": make_batches(ZOO["bert"]), "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        reconstruct(**call)
    assert all(torch.equal(before[name], tensor) for name, tensor in smaller.state_dict().items())


def test_chunks_change_nothing():
    """Transformers can run feed-forward blocks on a few tokens at a time."""
    # Chunks must divide the length.
    batches = [{name: tensor[:, :6] for name, tensor in batch.items()} for batch in make_batches(ZOO["bert"])]
    refitted = []
    for size in (0, 3):
        dense = make_model(chunk_size_feed_forward=size)
        smaller = pruned(dense, heads={0: [1]}, neurons={0: [0, 1], 1: [2]})
        reconstruct(smaller, dense, batches, progress=False)
        refitted.append(smaller.state_dict())
    for name, tensor in refitted[0].items():
        torch.testing.assert_close(tensor, refitted[1][name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("model_type", ["bert", "llama", "vit"])
def test_no_forward_is_left_replaced(model_type):
    """Transformers itself replaces forward methods while it records hidden states."""
    tiny = ZOO[model_type]
    dense, batches = tiny.model(output_hidden_states=True), make_batches(tiny)
    smaller = pruned(dense, neurons={0: [0, 1]})
    reconstruct(smaller, dense, batches, progress=False)
    for model in (dense, smaller):
        assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_constant_inputs_are_not_divided_by_their_rounding_errors():
    """Neurons that no input moves: all that a refit can do is to make up for their mean."""
    dense, batches = make_model(dtype=torch.float32), make_batches(ZOO["bert"])
    layer = dense.bert.encoder.layer[1]
    with torch.no_grad():
        layer.intermediate.dense.weight.zero_()
        layer.intermediate.dense.bias.uniform_(50, 60)
    smaller = pruned(dense, neurons={1: range(8)})
    reconstruct(smaller, dense, batches, progress=False)
    weight, before = (model.bert.encoder.layer[1].output.dense.weight for model in (smaller, dense))
    assert torch.equal(weight, before[:, 8:])
    torch.testing.assert_close(smaller(**batches[0]).logits, dense(**batches[0]).logits, rtol=0, atol=1e-4)


def test_attention_in_front_of_emptied_blocks_follows_what_these_gave():
    """OPT's feed-forward blocks, of which nothing is left here, see tokens as rows of one matrix."""
    tiny = ZOO["opt"]
    dense, batches = tiny.model(num_hidden_layers=3), make_batches(tiny)
    smaller = pruned(dense, heads={0: [1], 1: ALL_HEADS}, neurons={0: ALL_NEURONS, 1: ALL_NEURONS})
    reconstruct(smaller, dense, batches, ridge=1e-12, progress=False)
    seen = []
    smaller.model.decoder.layers[0].self_attn.out_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    states = [[m(**batch, output_hidden_states=True).hidden_states for batch in batches] for m in (smaller, dense)]
    mask = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    before, found = (torch.cat([of_batch[place] for of_batch in states[0]])[mask] for place in (0, 2))
    wanted = torch.cat([of_batch[2] for of_batch in states[1]])[mask] - before
    x = torch.nn.functional.pad(torch.cat(seen)[mask], (0, 1), value=1.0)
    expected = before + x @ torch.linalg.lstsq(x, wanted).solution
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
