"""Refits and tuned layers in bfloat16 come as near to the dense model as those in float32."""

import copy

import pytest
import torch
from accelerate import Accelerator
from convnets import CONVNETS
from encoders import TEXTS, save_encoder
from tiny import make_batches
from torch import nn
from trainers import make_trainer
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner
from zoo import ZOO

from hap_transformers import HapConfig, PruningPlan, apply_plan, reconstruct, tune_layers
from hap_transformers.cli import app
from hap_transformers.refit.layer_runs import LayerRuns


@pytest.fixture
def seen(monkeypatch):
    """The types of what linear layers and convolutions give while a refit runs them."""
    found, run = set(), LayerRuns._run

    def watched(self, *args, **kwargs):
        def note(module, args, output):
            if isinstance(module, (nn.Linear, nn.Conv2d, Conv1D)):
                found.add(output.dtype)

        handle = torch.nn.modules.module.register_module_forward_hook(note)
        try:
            run(self, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(LayerRuns, "_run", watched)
    return found


def in_float32(batches):
    """Batches without labels."""
    return [
        {k: v.float() if v.is_floating_point() else v for k, v in batch.items() if k != "labels"} for batch in batches
    ]


def pair(model_type, count=4):
    """A dense model, the pruned one, and batches."""
    dense = ZOO[model_type].model(torch.float32)
    smaller = copy.deepcopy(dense)
    apply_plan(smaller, PruningPlan.for_model(smaller, heads={0: [0], 1: [1]}, neurons={0: range(8), 1: range(8)}))
    return dense, smaller, in_float32(make_batches(ZOO[model_type], count))


def refitted(dense, smaller, batches, **arguments):
    found = copy.deepcopy(smaller)
    reconstruct(found, dense, batches, progress=False, **arguments)
    return found


def tuned(dense, smaller, batches, **arguments):
    found = copy.deepcopy(smaller)
    tune_layers(found, dense, batches, epochs=20, progress=False, **arguments)
    return found


def distance(model, dense, batches):
    with torch.no_grad():
        pairs = [[one.eval()(**batch).logits for one in (model, dense)] for batch in batches]
    return sum((found - wanted).square().sum().item() for found, wanted in pairs)


def assert_as_near(way, dense, smaller, batches):
    """In bfloat16 a way must bring a model as near to the dense one as in float32, but for a 20th of what it lost."""
    exact, low = way(dense, smaller, batches), way(dense, smaller, batches, precision="bf16")
    assert {parameter.dtype for parameter in low.parameters()} == {torch.float32}
    before, best, found = (distance(model, dense, batches) for model in (smaller, exact, low))
    assert found - best < 0.05 * before and best < before


# Norms before and after blocks, decoders, scaled blocks, windows, shared layers, and attention of many kinds.
REFITTED = ["albert", "beit", "bert", "deberta-v3", "gpt2", "llama", "modernbert", "mpnet", "swin", "t5", "whisper"]


@pytest.mark.parametrize("model_type", REFITTED)
def test_refits(model_type, seen):
    assert_as_near(refitted, *pair(model_type))
    assert seen == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("model_type", ["bert", "llama", "whisper"])
def test_tuned_layers(model_type, seen):
    assert_as_near(tuned, *pair(model_type))
    assert seen == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("name", ["resnet-bottleneck", "convnextv2"])
@pytest.mark.parametrize("way", [refitted, tuned])
def test_convolutions(name, way, seen):
    """Statistics of BatchNorm are those of the outputs, so they are as exact as these."""
    net = CONVNETS[name]
    dense = net.model().float()
    smaller = copy.deepcopy(dense)
    apply_plan(smaller, PruningPlan.for_model(smaller, **{net.kind: {0: [0, 1]}}))
    assert_as_near(way, dense, smaller, in_float32([net.batch(seed=seed) for seed in range(4)]))
    assert seen == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("way", [refitted, tuned])
def test_the_precision_is_the_accelerators(way, seen, monkeypatch):
    """fp16 leaves float32, as small gradients would underflow."""
    given = pair("bert")
    expected = way(*given, precision="bf16")
    for mixed_precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float32), ("no", torch.float32)):
        monkeypatch.setattr(Accelerator, "mixed_precision", mixed_precision)
        seen.clear()
        found = way(*given, accelerator=Accelerator(cpu=True))
        assert seen == {dtype}
        same = [torch.equal(p, q) for p, q in zip(found.parameters(), expected.parameters(), strict=True)]
        assert all(same) == (mixed_precision == "bf16")


@pytest.mark.parametrize("way", [refitted, tuned])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_of_other_types_stay_in_them(way, dtype):
    dense, smaller, batches = pair("bert")
    dense, smaller = dense.to(dtype), smaller.to(dtype)
    expected, found = (way(dense, smaller, batches, precision=precision) for precision in (None, "bf16"))
    assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize("way", [refitted, tuned])
def test_an_autocast_around_is_the_same(way):
    """It would multiply sums in bfloat16, and keep weights that have changed since."""
    given = pair("bert")
    expected = way(*given, precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        found = way(*given, precision="bf16")
    assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize("way", [refitted, tuned])
def test_an_unknown_precision_is_named(way):
    with pytest.raises(ValueError, match="Unknown precision 'int8'; choose 'bf16', 'fp16'"):
        way(*pair("bert"), precision="int8")


@pytest.mark.parametrize("flags, dtype", [({"bf16": True}, torch.bfloat16), ({}, torch.float32)], ids=str)
def test_the_trainer_refits_in_the_precision_of_its_training(tmp_path, seen, flags, dtype):
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.5, max_examples=12, tuning_epochs=1), **flags)
    trainer.prune()
    assert seen == {dtype}


@pytest.mark.parametrize("option, dtype", [(["--precision", "bf16"], torch.bfloat16), ([], torch.float32)], ids=str)
def test_the_command_refits_in_its_precision(tmp_path, seen, option, dtype):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    command = ["prune", save_encoder(tmp_path), "--texts", tmp_path / "texts.txt", "--ratio", 0.5, "--length", 12]
    command += ["--output", tmp_path / "out", "--tuning-epochs", 1, *option]
    CliRunner().invoke(app, [*map(str, command)], catch_exceptions=False)
    assert seen == {dtype}
