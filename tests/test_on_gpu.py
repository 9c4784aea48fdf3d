"""A GPU computes what the CPU computes. These tests are skipped where there is no CUDA device."""

import copy
import os

import pytest
import torch
from convnets import QUICK
from own_convnet import NETS
from tiny import DIMENSIONS, WHOLE_HEADS, make_batches, make_model
from trainers import Rows, make_trainer
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner
from zoo import ZOO

from hap_transformers import (
    METHODS,
    HapConfig,
    LatencyTable,
    PruningPlan,
    align_embeddings,
    align_heads,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
    tune_layers,
)
from hap_transformers.cli import app
from hap_transformers.efficiency import compare_latency
from hap_transformers.forward_modes import device_name


# The tests themselves can be tried where there is no GPU: HAP_TEST_DEVICE=cpu.
DEVICE = torch.device(os.environ.get("HAP_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="There is no CUDA device."
)
# Its probes are drawn on the device, so they differ from the CPU's.
EXACT = sorted(set(METHODS) - {"hessian_trace"})


def labelled(batches, model):
    """Batches with a class for each example or, as the model has it, for each token."""
    for batch in batches:
        with torch.no_grad():
            shape = model(**batch).logits.shape[:-1]
        yield {**batch, "labels": torch.arange(shape.numel()).view(shape) % model.config.num_labels}


def moved(batches, device):
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def road(model, batches, method="kronecker", device="cpu", align=False, **settings):
    """Scores, what is removed, and the outputs of the pruned and refitted model: all on the CPU."""
    dense, batches = copy.deepcopy(model).to(device), moved(batches, device)
    if align:
        align_heads(dense, batches, progress=False)
    scores = estimate_sensitivity(dense, batches, method, progress=False, **settings)
    plan = plan_pruning(scores, dense, ratio=0.4, min_neurons=0.0)
    pruned = copy.deepcopy(dense)
    apply_plan(pruned, plan)
    reconstruct(pruned, dense, batches, progress=False)
    if align:
        tune_layers(pruned, dense, batches, epochs=1, progress=False)
    with torch.no_grad():
        outputs = torch.cat([pruned(**batch).logits for batch in batches]).cpu()
    found = {kind: torch.cat([layer.cpu() for layer in layers]) for kind, layers in scores.scores.items()}
    return found, plan.removed, outputs


def assert_same(first, second):
    """Scores are ranked, so the largest is their scale; sums in another order moved DeBERTa's by 1e-6 of it."""
    for kind, scores in first[0].items():
        torch.testing.assert_close(second[0][kind], scores, rtol=0.0, atol=1e-5 * scores.abs().max().item())
    assert first[1] == second[1]
    torch.testing.assert_close(second[2], first[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", EXACT)
def test_every_method(method):
    model = make_model()
    batches = list(labelled(make_batches(ZOO["bert"], 2), model))
    settings = {"method": method, "components": WHOLE_HEADS}
    assert_same(road(model, batches, **settings), road(model, batches, device=DEVICE, **settings))


@pytest.mark.parametrize("architecture", sorted(ZOO))
def test_every_architecture(architecture):
    model = ZOO[architecture].model()
    batches = list(labelled(make_batches(ZOO[architecture], 2), model))
    settings = {"components": WHOLE_HEADS}
    assert_same(road(model, batches, **settings), road(model, batches, device=DEVICE, **settings))


@pytest.mark.parametrize("name", [*QUICK, "own"])
def test_convolutional_networks(name, known_convnet):
    net = NETS[name]
    model, batch = net.model(torch.float64), net.batch(8)
    batches = list(labelled([batch], model))
    assert_same(road(model, batches), road(model, batches, device=DEVICE))


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_dimensions_that_are_aligned_and_tuned(architecture):
    model = ZOO[architecture].model()
    batches = list(labelled(make_batches(ZOO[architecture], 2), model))
    settings = {"components": DIMENSIONS, "align": architecture == "bert"}
    assert_same(road(model, batches, **settings), road(model, batches, device=DEVICE, **settings))


def test_layers_scored_in_parts():
    model = make_model()
    batches = list(labelled(make_batches(ZOO["bert"], 2), model))
    whole = road(model, batches, components=WHOLE_HEADS)
    assert_same(whole, road(model, batches, device=DEVICE, components=WHOLE_HEADS, max_memory=40_000))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_ranks_alike(precision):
    model = make_model(dtype=torch.float32)
    batches = list(labelled(make_batches(ZOO["bert"], 2), model))
    exact = road(model, batches, "gauss_newton_trace", components=WHOLE_HEADS)[0]
    coarse = road(model, batches, "gauss_newton_trace", DEVICE, components=WHOLE_HEADS, precision=precision)[0]
    for kind, scores in exact.items():
        assert torch.corrcoef(torch.stack([scores, coarse[kind].to(scores.dtype)]))[0, 1] > 0.99


def aligned_and_narrowed(model, batches, device):
    """Outputs of a model whose residual stream has been aligned, and has lost its last four directions."""
    narrow, batches = copy.deepcopy(model).to(device), moved(batches, device)
    align_embeddings(narrow, batches, progress=False)
    scores = estimate_sensitivity(narrow, batches, components=["embedding_dims"], progress=False)
    dense = copy.deepcopy(narrow)
    apply_plan(narrow, PruningPlan.for_model(narrow, embedding_dims={0: range(12, 16)}))
    reconstruct(narrow, dense, batches, progress=False)
    with torch.no_grad():
        return scores.scores["embedding_dims"][0].cpu(), narrow(**batches[0]).logits.cpu()


def test_dimensions_of_embeddings():
    model = make_model()
    batches = list(labelled(make_batches(ZOO["bert"], 2), model))
    scores, logits = aligned_and_narrowed(model, batches, "cpu")
    found = aligned_and_narrowed(model, batches, DEVICE)
    torch.testing.assert_close(found[0], scores, rtol=0.0, atol=1e-5 * scores.max().item())
    torch.testing.assert_close(found[1], logits, rtol=1e-5, atol=1e-6)


def test_whole_layers():
    model = make_model()
    batches = list(labelled(make_batches(ZOO["bert"], 2), model))
    (first, _, _), (second, _, _) = (
        road(model, batches, device=device, components=["layers"]) for device in ("cpu", DEVICE)
    )
    torch.testing.assert_close(second["layers"], first["layers"], rtol=1e-6, atol=0.0)


def test_implants():
    model = make_model()
    batches = list(labelled(make_batches(ZOO["bert"], 2), model))
    scores = estimate_sensitivity(model, batches, components=WHOLE_HEADS, progress=False)
    plan = plan_pruning(scores, model, ratio=0.5, min_neurons=0.0, neuron_multiple=2, implant_ratio=0.3)
    assert plan.implants
    outputs = []
    for device in ("cpu", DEVICE):
        dense, own = copy.deepcopy(model).to(device), moved(batches, device)
        pruned = copy.deepcopy(dense)
        apply_plan(pruned, plan)
        reconstruct(pruned, dense, own, init_implants=tuple(plan.implants), progress=False)
        with torch.no_grad():
            outputs.append(pruned(**own[0]).logits.cpu())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


def test_the_command(tmp_path, model_dir):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"a good film {letter} {other}" for letter in "abcdefgh" for other in "abcdefgh"))
    command = ["prune", str(model_dir), "--texts", str(texts), "--ratio", "0.4", "--output", str(tmp_path / "small")]
    result = CliRunner().invoke(app, [*command, "--length", "12", "--device", DEVICE.type], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    small, dense = map(AutoModelForSequenceClassification.from_pretrained, (tmp_path / "small", model_dir))
    assert small.num_parameters() < dense.num_parameters()


@pytest.mark.parametrize("mode", ["eager", "compiled", "cuda_graphs"])
def test_latency_is_measured_in_every_mode(mode):
    if mode == "cuda_graphs" and DEVICE.type == "cpu":
        pytest.skip("CUDA graphs need a CUDA device.")
    model = make_model(dtype=torch.float32).to(DEVICE)
    (inputs,) = moved(make_batches(ZOO["bert"], 1), DEVICE)
    seconds = compare_latency({"one": model, "two": copy.deepcopy(model)}, inputs, 3, mode=mode)
    assert set(seconds) == {"one", "two"} and min(seconds.values()) > 0


def test_a_latency_table_names_the_device():
    (inputs,) = moved(make_batches(ZOO["bert"], 1), DEVICE)
    table = LatencyTable.measure(make_model(dtype=torch.float32).to(DEVICE), inputs, repeats=2)
    assert table.device == device_name(DEVICE)


def test_a_trainer_prunes_recovers_and_saves(tmp_path):
    config = HapConfig(ratio=0.4, max_examples=16, refit_examples=16, min_neurons=0.0, components=WHOLE_HEADS)
    arguments = {"use_cpu": DEVICE.type == "cpu", "bf16": True, "hap_config": config}
    trainer = make_trainer(tmp_path, watched=True, rows=Rows(48), **arguments)
    trainer.prune()
    trainer.train()
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]
    loaded = make_trainer(tmp_path, model=AutoModelForSequenceClassification.from_pretrained(tmp_path), **arguments)
    assert trainer.model.device.type == DEVICE.type
    assert loaded.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-3)
