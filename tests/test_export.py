"""Pruned models work with torch.export, ONNX and torch.compile."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from convnets import CONVNETS, REPLACED, with_implants, with_one_emptied
from dims import CASES, without
from zoo import HEADS, NEURONS, ZOO

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.components.releases import TRANSFORMERS_4


def pruned(model_type):
    """A model without one attention and one feed-forward block, with an implant, that returns no cache."""
    tiny = ZOO[model_type]
    if tiny.family == "T5":  # Its decoder would return a cache, and dense T5 with sdpa attention fails in ONNX.
        tiny = dataclasses.replace(tiny, task="ForTokenClassification")
    model = tiny.model(
        torch.float32, use_cache=False, **({"attn_implementation": "eager"} if tiny.family == "T5" else {})
    )
    plan = {"heads": {0: [1], 1: range(HEADS)}, "neurons": {0: range(NEURONS), 1: [0, 5]}, "implants": {1: 1}}
    apply_plan(model, PruningPlan.for_model(model, **plan))
    return model, tiny.batch(dtype=torch.float32)


def with_fewer_dimensions(model_type):
    """A model whose heads have lost dimensions, one of them all."""
    tiny = ZOO[model_type]
    model = without(tiny.model(torch.float32, use_cache=False), tiny, CASES["a head"])
    return model, tiny.batch(dtype=torch.float32)


def convolutional(name):
    """A model that has lost some channels, or neurons, of one chain and all of another."""
    net = CONVNETS[name]
    return with_one_emptied(net, torch.float32), net.batch(dtype=torch.float32)


def with_pointwise_filters(name):
    """A model of which some channels have 1x1 filters."""
    net = CONVNETS[name]
    return with_implants(net, *REPLACED[name], torch.float32), net.batch(dtype=torch.float32)


# How models are pruned.
FORMS = {
    "heads": pruned,
    "dimensions": with_fewer_dimensions,
    "convolutional": convolutional,
    "implants": with_pointwise_filters,
}


@pytest.mark.parametrize("model_type", ["bert", "deberta-v3", "gpt2", "llama", "modernbert", "mpnet", "vit"])
def test_torch_export_of_dimensions(model_type):
    model, batch = with_fewer_dimensions(model_type)
    program = torch.export.export(model, (), kwargs=batch, strict=False)
    torch.testing.assert_close(program.module()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ["resnet-bottleneck", "regnet-y", "efficientnet", "convnextv2"])
def test_torch_export_of_convolutions(name):
    model, batch = convolutional(name)
    program = torch.export.export(model, (), kwargs=batch, strict=False)
    torch.testing.assert_close(program.module()(**batch).logits, model(**batch).logits)


@pytest.mark.slow
def test_torch_export(model_type):
    if model_type == "bart" and TRANSFORMERS_4:
        pytest.skip("BART's classification head in Transformers 4 cannot be exported, dense or pruned")
    model, batch = pruned(model_type)
    program = torch.export.export(model, (), kwargs=batch, strict=False)
    torch.testing.assert_close(program.module()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("model_type", "form"),
    [
        *((name, "heads") for name in ("deberta-v3", "gpt2", "llama", "modernbert", "t5-gated", "vit")),
        ("bert", "dimensions"),
        ("llama", "dimensions"),
        ("regnet-y", "convolutional"),
        ("resnet-basic", "implants"),
    ],
)
@pytest.mark.slow
def test_onnx(tmp_path, model_type, form):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batch = FORMS[form](model_type)
    torch.onnx.export(model, (), kwargs=batch, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    outputs = session.run(None, {entry.name: batch[entry.name].numpy() for entry in session.get_inputs()})
    expected = model(**batch).logits.detach().numpy()
    (logits,) = [output for output in outputs if output.shape == expected.shape]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def of_one_layer():
    """A model that compiles fast: part of its heads, all neurons and an implant in their place."""
    model = ZOO["bert"].model(torch.float32, num_hidden_layers=1)
    apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={0: range(NEURONS)}, implants={0: 1}))
    return model, ZOO["bert"].batch(dtype=torch.float32)


@pytest.fixture
def scalar_code():
    """C++ without vector instructions. To find those of a CPU, the compiler runs a dozen times before the first."""
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False, "compile_threads": 1}):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "make, backend",
    [
        pytest.param(
            of_one_layer,
            "inductor",
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++, which torch.compile needs"),
        ),
        (lambda: with_fewer_dimensions("bert"), "aot_eager"),
        (lambda: with_fewer_dimensions("llama"), "aot_eager"),
    ],
    ids=["heads", "dimensions", "rotary pairs"],
)
def test_torch_compile(make, backend, scalar_code):
    """The whole model is one graph."""
    model, batch = make()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)(**batch).logits
    torch.testing.assert_close(compiled, model(**batch).logits)
