"""Plain `from_pretrained` reloads pruned convolutional networks under any class, and pipelines run them."""

import numpy as np
import pytest
import torch
import transformers
from convnets import CONVNETS, all_components, with_one_emptied
from PIL import Image
from transformers import pipeline

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.components.releases import IMAGE_PROCESSOR


def assert_equal(model, other):
    """Two models have the same modules, weights, running statistics and trained parameters."""
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    for (name, module), (_, twin) in zip(model.named_modules(), other.named_modules(), strict=True):
        assert type(module) is type(twin), name
        assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in twin.parameters()], name


@pytest.mark.parametrize("name", CONVNETS)
def test_prune_save_reload_prune_save_reload(tmp_path, name):
    net = CONVNETS[name]
    model = with_one_emptied(net, torch.float32)
    model.save_pretrained(tmp_path / "first")
    again = type(model).from_pretrained(tmp_path / "first")
    assert_equal(again, model)
    for part in (model, again):
        gone = {1: all_components(net)[1], 2: [0, 3]} if net.kind == "channels" and len(net.chains) > 2 else {0: [0]}
        apply_plan(part, PruningPlan.for_model(part, **{net.kind: gone}))
    again.save_pretrained(tmp_path / "second")
    last = type(model).from_pretrained(tmp_path / "second")
    assert_equal(last, model)
    batch = net.batch(dtype=torch.float32)
    torch.testing.assert_close(last(**batch).logits, model(**batch).logits)
    assert last.config.quantization_config == again.config.quantization_config == model.config.quantization_config


@pytest.mark.parametrize("task", ["Model", "Backbone"])
@pytest.mark.parametrize("name", ["resnet-bottleneck", "convnextv2"])
def test_loads_without_its_head(tmp_path, name, task):
    net = CONVNETS[name]
    model = with_one_emptied(net, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, net.family + task).from_pretrained(tmp_path)
    expected = model.base_model.state_dict()
    layers = [path for path in loaded.state_dict() if path.startswith("encoder.")]
    assert len(layers) > 20 and all(torch.equal(loaded.state_dict()[path], expected[path]) for path in layers)
    loaded(**net.batch(dtype=torch.float32))


def test_pipeline(tmp_path):
    model = with_one_emptied(CONVNETS["resnet-basic"], torch.float32)
    model.save_pretrained(tmp_path)
    processor = getattr(transformers, IMAGE_PROCESSOR)(size={"height": 24, "width": 24})
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    best, *_ = pipeline("image-classification", model=str(tmp_path))(image)
    expected = model(**processor(image, return_tensors="pt")).logits.softmax(1)
    assert best["score"] == pytest.approx(expected.max().item(), rel=1e-6)
    assert best["label"] == f"LABEL_{expected.argmax().item()}"
