"""Blocks without components behave as ordinary modules of size zero: for adapters, hooks, `backward` and compilers."""

import copy
import warnings

import pytest
import torch
from tiny import make_batch, make_model
from torch import nn
from zoo import ALL_HEADS, ALL_NEURONS, LAYERS, ZOO, logits, masked

from hap_transformers import PruningPlan, apply_plan, emptied_modules
from hap_transformers.components.groups import find_groups


HEADS, NEURONS = {0: ALL_HEADS}, {1: ALL_NEURONS}


def emptied(model, heads=HEADS, neurons=NEURONS):
    """A copy of a model without any heads in the first layer and any neurons in the second."""
    other = copy.deepcopy(model)
    apply_plan(other, PruningPlan.for_model(other, heads=heads, neurons=neurons))
    return other


def empty_modules(model) -> dict[str, nn.Module]:
    """The projections of groups without components."""
    groups = [group for group in find_groups(model) if not group.num_components]
    found = {projection.name: projection.module for group in groups for projection in group.projections}
    assert len(groups) == 2
    return found


def inputs_of(module: nn.Module) -> torch.Tensor:
    size = getattr(module, "in_features", None)
    size = module.nx if size is None else size
    return torch.randn(2, 3, size, dtype=module.weight.dtype, requires_grad=True)


def test_projections_give_what_ordinary_ones_of_size_zero_give(model_type):
    """The same module of the class that it had before."""
    model = emptied(ZOO[model_type].model())
    for name, module in empty_modules(model).items():
        ordinary = copy.deepcopy(module)
        ordinary.__class__ = getattr(type(module), "dense_class", type(module))
        if isinstance(ordinary, nn.Linear):
            x = inputs_of(module)
            outputs = [m(x) for m in (module, ordinary)]
            assert outputs[0].shape == outputs[1].shape and outputs[0].dtype == outputs[1].dtype, name
            torch.testing.assert_close(*outputs, rtol=0, atol=0)
            assert outputs[0].requires_grad


def test_without_gradients_one_kernel_is_left(model_type):
    """A copy of the bias; its values and type are those that the module gives with gradients."""
    model = emptied(ZOO[model_type].model(torch.float32))
    outputs = [group.reader.module for group in find_groups(model) if not group.num_components]
    assert len(outputs) == 2
    for module in outputs:
        x = inputs_of(module)
        expected = module(x).detach()
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            output = module(x)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        names = {event.name for event in profiler.events()}
        assert not names & {"aten::sum", "aten::add", "aten::addmm", "aten::mm"}
        output += 1  # No view of the bias.
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected, rtol=0, atol=0)


def test_outputs_may_be_changed_in_place(model_type):
    """As adapters and some hooks do, while what was read is used elsewhere, before and after."""
    model = emptied(ZOO[model_type].model())
    for name, module in empty_modules(model).items():
        x = inputs_of(module)
        read = x * 1
        squares = read.square()
        output = module(read)
        output += 1
        output.mul_(2)
        assert output._base is not read and read._version == 0, name
        (output.sum() + squares.sum() + read.pow(3).sum()).backward()
        torch.testing.assert_close(x.grad, 2 * x + 3 * x**2, rtol=1e-12, atol=0, msg=name)


def test_gradients_are_those_of_the_masked_model(model_type):
    tiny = ZOO[model_type]
    dense = tiny.model()
    smaller, expected = emptied(dense), masked(dense, tiny, HEADS, NEURONS)
    for model in (smaller, expected):
        logits(model, tiny).square().sum().backward()
    reference = dict(expected.named_parameters())
    compared = 0
    for name, parameter in smaller.named_parameters():
        if parameter.shape == reference[name].shape and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-7, atol=1e-9)
            compared += 1
    assert compared > 10
    assert all(p.grad is None or p.grad.isfinite().all() for p in smaller.parameters())


def test_hooks_run_forward_and_backward(model_type):
    """Also those that look at gradients, for which torch puts a view between module and output."""
    tiny = ZOO[model_type]
    model = emptied(tiny.model())
    expected = logits(model, tiny).detach()
    heard, empty = [], empty_modules(model)
    called = set()  # An attention without heads does not ask for queries, keys and values.
    for group in find_groups(model):
        if not group.num_components:
            projections = group.projections if group.kind.name == "neurons" else group.readers
            called |= {projection.name for projection in projections}
    for name, module in empty.items():
        module.register_forward_pre_hook(lambda m, args, n=name: heard.append(("before", n)))
        module.register_forward_hook(lambda m, args, output, n=name: heard.append(("after", n)))
        module.register_full_backward_pre_hook(lambda m, gradients, n=name: heard.append(("back", n)))
        module.register_full_backward_hook(lambda m, given, taken, n=name: heard.append(("backward", n)))
    found = logits(model, tiny)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.square().sum().backward()
    for event in ("before", "after", "back"):
        assert {name for what, name in heard if what == event} == called, event
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_hooks_may_replace_what_a_block_gives():
    model = emptied(make_model())
    expected = logits(model, ZOO["bert"])
    output = model.bert.encoder.layer[1].output.dense
    handle = output.register_forward_hook(lambda m, args, out: out.add_(1))  # In place, behind the block.
    changed = logits(model, ZOO["bert"])
    changed.sum().backward()
    handle.remove()
    assert not torch.equal(changed, expected)
    with torch.no_grad():
        output.bias += 1
    torch.testing.assert_close(logits(model, ZOO["bert"]), changed, rtol=1e-9, atol=1e-12)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("model_type, backend", [("bert", "eager"), ("gpt2", "aot_eager"), ("llama", "aot_eager")])
def test_compiled(model_type, backend, fresh_compiler):
    tiny = ZOO[model_type]
    model = emptied(tiny.model(torch.float32, **{tiny.names[2]: 1}), heads={0: ALL_HEADS}, neurons={0: ALL_NEURONS})
    expected = logits(model, tiny)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = torch.compile(model, backend=backend)(**tiny.batch(dtype=torch.float32)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-3)


def test_traced():
    model = emptied(
        ZOO["bert"].model(torch.float32, return_dict=False), heads={0: ALL_HEADS}, neurons={0: ALL_NEURONS}
    )
    ids = ZOO["bert"].batch(dtype=torch.float32)["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of values that a trace makes constants.
        traced = torch.jit.trace(model, (ids,))
    torch.testing.assert_close(traced(ids), model(ids))


ADAPTERS = {
    "lora": lambda peft, modules: peft.LoraConfig(r=2, target_modules=modules, task_type="SEQ_CLS"),
    "rslora": lambda peft, modules: peft.LoraConfig(r=2, target_modules=modules, task_type="SEQ_CLS", use_rslora=True),
    "ia3": lambda peft, modules: peft.IA3Config(
        target_modules=modules, feedforward_modules=["dense"], task_type="SEQ_CLS"
    ),
    "vera": lambda peft, modules: peft.VeraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"),
    "loha": lambda peft, modules: peft.LoHaConfig(r=2, target_modules=modules, task_type="SEQ_CLS"),
    "lokr": lambda peft, modules: peft.LoKrConfig(r=2, target_modules=modules, task_type="SEQ_CLS"),
    "adalora": lambda peft, modules: peft.AdaLoraConfig(
        init_r=2, target_r=1, target_modules=modules, total_step=10, task_type="SEQ_CLS"
    ),
    "layer norms": lambda peft, modules: peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"),
    "prompts": lambda peft, modules: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("where", ["both", "heads", "neurons"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_on_emptied_blocks_learn(adapter, where):
    peft = pytest.importorskip("peft")
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make_model(dtype=torch.float32, **settings)
    removed = {"heads": HEADS, "neurons": NEURONS, "both": None}[where]
    model = emptied(model) if removed is None else emptied(model, **{"heads": None, "neurons": None, where: removed})
    batch = make_batch(4)
    expected = model(**batch).logits.detach()
    modules = ["query", "key", "value", "dense"]
    adapted = peft.get_peft_model(model, ADAPTERS[adapter](peft, modules)).train()
    if adapter != "prompts":  # Which others begin with: nothing changes.
        torch.testing.assert_close(adapted(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    learned = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learned.items()}
    optimizer = torch.optim.SGD(learned.values(), lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(**batch).loss
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is None or p.grad.isfinite().all() for p in learned.values())
        optimizer.step()
    assert torch.tensor(losses).isfinite().all() and losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in adapted.parameters())
    assert any(not torch.equal(before[name], p) for name, p in learned.items() if "classifier" not in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trained_with_gradient_checkpointing(dtype):
    model = emptied(make_model(dtype=dtype)).train()
    model.gradient_checkpointing_enable()
    model(**make_batch(4)).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad is not None for p in model.parameters()) > LAYERS


def test_dora_learns_where_emptied_modules_are_left_out():
    """DoRA divides by the norm of its module's weights, which is zero where there are none."""
    peft = pytest.importorskip("peft")
    model = emptied(make_model(dtype=torch.float32))
    left_out = emptied_modules(model)
    assert "bert.encoder.layer.1.output.dense" in left_out
    config = peft.LoraConfig(
        r=2, target_modules=["query", "dense"], exclude_modules=left_out, task_type="SEQ_CLS", use_dora=True
    )
    loss = peft.get_peft_model(model, config).train()(**make_batch(4)).loss
    loss.backward()
    assert loss.isfinite()
