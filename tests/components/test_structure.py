"""Records of structure: wrong ones are refused, incomplete ones are read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.components.releases import TRANSFORMERS_4


def edited(tmp_path, change):
    """A pruned checkpoint whose config was changed by hand."""
    model = make_model(dtype=torch.float32)
    apply_plan(model, PruningPlan.for_model(model, heads={0: [1]}, neurons={1: [0, 1]}))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config, config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, s: s["neurons"].update({"9": 4}), "neurons by layer as .*has layers 0 to 1"),
        (lambda c, s: s["heads"].update({"attention.query": 4}), "heads by layer as .*has layers 0 to 1"),
        (lambda c, s: s.update({"neurons": [4]}), "neurons by layer as"),
        (lambda c, s: s["neurons"].update({"1": 10**12}), "expected a whole number from 0 to 24"),
        (lambda c, s: s["neurons"].update({"1": -4}), "expected a whole number"),
        (lambda c, s: s["neurons"].update({"1": "22"}), "expected a whole number"),
        (lambda c, s: s["neurons"].update({"1": True}), "expected a whole number"),
        (lambda c, s: s["heads"].update({"0": 2}), "pruned_heads leaves it 3 of 4"),
        (lambda c, s: c.update(pruned_heads={}), "pruned_heads leaves it 4 of 4"),
        (lambda c, s: c.update(pruned_heads={"0": [1], "9": [0]}), "pruned_heads of the checkpoint's config are"),
        (lambda c, s: c.update(pruned_heads={"0": [1, 99]}), "pruned_heads of the checkpoint's config are"),
        (lambda c, s: c.update(pruned_heads={"0": "01"}), "pruned_heads of the checkpoint's config are"),
        (lambda c, s: s.update({"to_dict": "x"}), "'to_dict'.*Upgrade"),
        (lambda c, s: s.update({"eval": "print()"}), "'eval'.*Upgrade"),
        (lambda c, s: c.update(model_type="bloom", architectures=None), "bloom"),
    ],
)
def test_a_config_edited_by_hand_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(edited(tmp_path, change))


@pytest.mark.parametrize(
    "change",
    [
        lambda c, s: s["neurons"].update({"1": 20}),
        lambda c, s: s["neurons"].pop("1"),
        lambda c, s: (s["heads"].update({"0": 2}), c.update(pruned_heads={"0": [0, 1]})),
    ],
)
def test_sizes_that_do_not_fit_the_weights_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match="do not belong together"):
        AutoModelForSequenceClassification.from_pretrained(edited(tmp_path, change))


@pytest.mark.skipif(TRANSFORMERS_4, reason="Transformers 4 builds the dense model in memory before it asks a loader")
@pytest.mark.parametrize("missing", [False, True], ids=["of another size", "missing"])
def test_absurd_sizes_take_no_memory(tmp_path, missing):
    def change(config, structure):
        config["intermediate_size"] = 10**13
        structure["neurons"] = {"0": 10**12, "1": 10**12}

    edited(tmp_path, change)
    if missing:
        weights = load_file(tmp_path / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if "intermediate" not in name}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not belong together"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_record_without_one_kind_can_be_pruned_again(tmp_path):
    model = make_model(dtype=torch.float32)
    model.prune_heads({0: [1]})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["neurons"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for part in (model, again):
        apply_plan(part, PruningPlan.for_model(part, neurons={1: [0]}))
    again.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_config_that_another_model_pruned_is_refused():
    """Two models of one config would overwrite each other's record."""
    config = BertConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=2, intermediate_size=8)
    first, second = BertModel(config), BertModel(config)
    apply_plan(first, PruningPlan.for_model(first, heads={0: [0]}, neurons={1: [0]}))
    for plan in ({0: [3]}, {1: [3]}):
        with pytest.raises(
            ValueError, match="config of this BertModel records a different pruning of layer .*deepcopy"
        ):
            second.prune_heads(plan)
    first.prune_heads({0: [1]})
    assert first.config.pruned_heads == {0: [0, 1]}
