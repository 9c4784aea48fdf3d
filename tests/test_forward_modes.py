"""Modes of running a forward pass. CUDA graphs are tested with a stand-in for the device."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny import make_batch, make_model

from hap_transformers import HapConfig, LatencyTable, PlanningSettings
from hap_transformers.efficiency import compare_latency, evaluating
from hap_transformers.forward_modes import MODES, device_name, forward_pass, validate_mode


def test_modes_are_refused_by_name():
    model, batch = make_model(dtype=torch.float32), make_batch()
    for refused in (
        lambda mode: PlanningSettings(latency_mode=mode),
        lambda mode: HapConfig(latency_mode=mode),
        lambda mode: compare_latency({"": model}, batch, mode=mode),
        lambda mode: LatencyTable.measure(model, batch, mode=mode),
    ):
        with pytest.raises(ValueError, match="mode 'fast'; choose one of eager, compiled, cuda_graphs"):
            refused("fast")
    for refused in (
        compare_latency,
        lambda models, *args, **kwargs: LatencyTable.measure(models[""], *args, **kwargs),
    ):
        with pytest.raises(ValueError, match="'cuda_graphs' needs a CUDA device, and the model runs on 'cpu'"):
            refused({"": model}, batch, mode="cuda_graphs")
    with pytest.raises(ValueError, match="Unknown precision 'fp8'"):
        compare_latency({"": model}, batch, precision="fp8")
    assert HapConfig(latency_mode="cuda_graphs").latency_mode == "cuda_graphs"  # Of a device elsewhere, by its table.
    validate_mode("cuda_graphs", torch.device("cuda"))


@pytest.mark.parametrize(
    "precision, dtype", [(None, torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precisions(precision, dtype):
    model, heard = make_model(dtype=torch.float32), []
    model.classifier.register_forward_hook(lambda module, args, output: heard.append(output.dtype))
    assert compare_latency({"": model}, make_batch(), 1, precision=precision)[""] > 0
    assert set(heard) == {dtype} and len(heard) == 3


@pytest.fixture
def compiled(monkeypatch):
    """The graphs that torch.compile hands to a backend."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **given: compile_model(model, backend=backend, **given))
    yield graphs
    torch.compiler.reset()


@torch._dynamo.config.patch(recompile_limit=2)
@pytest.mark.slow
def test_every_copy_is_compiled(compiled):
    """Beyond as many versions of one code as torch compiles by default: 8, and here 2."""
    model = make_model(dtype=torch.float32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2)
    batch = {name: value for name, value in make_batch().items() if name != "labels"}
    table = LatencyTable.measure(model, batch, mode="compiled", points=2, repeats=1, progress=False)
    measured = sum(len(counts) - 1 for counts in table.counts.values())
    assert measured >= 4 and len(compiled) >= measured + 1 and table.mode == "compiled"
    assert torch._dynamo.config.recompile_limit == 2
    before = len(compiled)
    compare_latency({"a": model, "b": model}, batch, 1, mode="compiled")
    assert len(compiled) > before  # What was compiled before is forgotten.


@pytest.fixture
def cuda(monkeypatch):
    """A device that notes what it is asked to do."""
    events = []

    class Graph:
        def replay(self):
            events.append("replay")

    @contextmanager
    def noted(name):
        events.append(f"begin {name}")
        yield
        events.append(f"end {name}")

    stream = SimpleNamespace(wait_stream=lambda other: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: noted(f"on {device}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted("warm-up"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: noted("capture"))
    return events


def test_a_cuda_graph_is_captured_once_and_replayed(cuda):
    model, batch = make_model(dtype=torch.float32), make_batch()
    model.register_forward_hook(lambda *args: cuda.append("run"))
    run = MODES["cuda_graphs"](model, lambda network: network(**batch)[1])
    capture = ["begin capture", "run", "end capture"]
    warm_up = ["wait", "begin warm-up", *["run"] * 3, "end warm-up", "wait"]
    assert cuda == ["begin on cpu", *warm_up, *capture, "end on cpu"]
    del cuda[:]
    with evaluating(model):
        torch.testing.assert_close(run(), model(**batch)[1])
    assert cuda == ["replay", "run"] and not run().requires_grad


def test_a_model_that_cannot_be_captured_is_named(cuda):
    def run(network):
        if cuda[-1] == "begin capture":
            raise RuntimeError("operation not permitted when stream is capturing.")

    with pytest.raises(ValueError, match="BertForSequenceClassification cannot be captured .*permitted.*compiled"):
        MODES["cuda_graphs"](make_model(), run)


def test_names_of_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert device_name(torch.device("cuda")) == "NVIDIA H100"
    assert f"{torch.get_num_threads()} threads" in device_name(torch.device("cpu"))
    assert device_name(torch.device("mps")) == "mps"


def test_an_eager_pass_gives_the_first_output():
    model, batch = make_model(), make_batch()
    with evaluating(model):
        torch.testing.assert_close(forward_pass(model, batch)(), model(**batch).loss, rtol=0, atol=0)
