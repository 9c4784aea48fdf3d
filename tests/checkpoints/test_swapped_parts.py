"""`save_pretrained` refuses models in which a part, a layer or a block was pruned in another model."""

import copy

import pytest
import torch
from tiny import make_model
from trainers import make_trainer
from transformers import (
    BertConfig,
    BertLMHeadModel,
    EncoderDecoderModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)
from zoo import ZOO

from hap_transformers import PruningPlan, apply_plan


REMOVED = {"heads": {0: [1]}, "neurons": {1: range(8)}}


def new(name="bert"):
    return ZOO[name].model(torch.float32)


def pruned(model, **removed):
    apply_plan(model, PruningPlan.for_model(model, **(removed or REMOVED)))
    return model


def take(model, other, *paths):
    """Puts modules of another model in the place of a model's own."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.base_model.get_submodule(parent), name, other.base_model.get_submodule(path))
    return model


LAYER, FFN = "encoder.layer.1", ("encoder.layer.1.intermediate", "encoder.layer.1.output")
SWAPPED = {
    "the layers": ("bert", {}, ["encoder"]),
    "a list of layers": ("bert", {}, ["encoder.layer"]),
    "one layer": ("bert", {}, [LAYER]),
    "one layer without heads": ("bert", {"heads": {1: range(4)}}, [LAYER]),
    "a feed-forward block": ("bert", {}, FFN),
    "an empty block": ("bert", {"neurons": {1: range(24)}}, FFN),
    "a T5 encoder's layers": ("t5", {"heads": {0: [1]}}, ["encoder.block"]),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_pruned_modules_in_a_dense_model(name, tmp_path):
    architecture, removed, paths = SWAPPED[name]
    model = take(new(architecture), pruned(new(architecture), **removed), *paths)
    with pytest.raises(ValueError, match=f"of this {type(model).__name__} was pruned, but the config of the whole"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="was pruned, but the config of the whole"):
        make_trainer(tmp_path / "trainer", model=model)
    assert not (tmp_path / "model").exists()


def test_pruned_modules_in_a_model_pruned_elsewhere(tmp_path):
    model = take(pruned(new(), heads={0: [1]}), pruned(new(), neurons={1: range(8)}), *FFN)
    with pytest.raises(ValueError, match="neurons of layer 1 of this .* pruned in another model.*before pruning"):
        model.save_pretrained(tmp_path / "model")
    model = take(pruned(new(), neurons={0: [1]}), pruned(new(), heads={1: [0]}), LAYER)
    with pytest.raises(ValueError, match="Layer 1 .* has 3 heads.*swapped, moved or dropped after pruning"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_modules_swapped_before_pruning_or_pruned_alike_are_saved(tmp_path):
    before = pruned(take(new(), new(), *FFN))
    alike = take(pruned(new()), pruned(new()), "encoder")
    for model in (before, alike):
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_composite_models(tmp_path):
    config = {**BertConfig.to_dict(make_model().config), "is_decoder": True, "add_cross_attention": True}
    vision = ViTModel(ViTConfig(**{**new("vit").config.to_dict(), "image_size": 8, "patch_size": 4}))
    composites = {
        "encoder": EncoderDecoderModel(encoder=pruned(new().bert), decoder=BertLMHeadModel(BertConfig(**config))),
        "vision_model": VisionTextDualEncoderModel(vision_model=pruned(vision), text_model=new().bert),
    }
    for name, model in composites.items():
        with pytest.raises(ValueError, match=f"'{name}' of this {type(model).__name__} was pruned.*its own save_pre"):
            model.save_pretrained(tmp_path / "whole")
        assert not (tmp_path / "whole").exists()
        part = model.get_submodule(name)
        part.save_pretrained(tmp_path / name)  # As the message says.
        loaded = type(part).from_pretrained(tmp_path / name)
        assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), part.parameters(), strict=True))


def test_dense_models_are_saved_whatever_was_done_to_them(tmp_path):
    """Only pruned modules are looked at."""
    model = new()
    model.bert.encoder.layer[0].intermediate.dense = torch.nn.Linear(16, 10)
    model.bert.encoder.layer[0].output.dense = torch.nn.Linear(10, 16)
    model.bert.encoder.layer[1].attention = torch.nn.Identity()
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(model)
    pruned(new())
    other.save_pretrained(tmp_path)
