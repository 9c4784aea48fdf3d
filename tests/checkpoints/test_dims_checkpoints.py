"""Checkpoints of models whose heads have lost dimensions: reloading, wrong records, pruning again."""

import copy
import json

import pytest
import torch
from dims import ALL, CASES, left_of, without
from zoo import ZOO, logits

from hap_transformers import PruningPlan, apply_plan, estimate_sensitivity
from hap_transformers.components.groups import find_groups


def saved(folder, model_type="bert", case="some"):
    tiny = ZOO[model_type]
    model = without(tiny.model(torch.float32), tiny, CASES[case])
    model.save_pretrained(folder)
    return model, tiny


def edited(folder, change, model_type="bert"):
    """Loads a checkpoint whose config was changed."""
    model, _ = saved(folder, model_type)
    config = json.loads((folder / "config.json").read_text())
    change(config, config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return type(model).from_pretrained(folder)


# Every record for each way to store projections, and two records, of even and of uneven heads, for the others.
RECORDS = [
    (model_type, case)
    for model_type in ZOO
    for case in (CASES if model_type in ("bert", "deberta-v2", "gpt2", "llama", "modernbert") else ("some", "even"))
]


@pytest.mark.parametrize("model_type, case", RECORDS)
def test_reloaded_models_are_equal(tmp_path, model_type, case):
    model, tiny = saved(tmp_path, model_type, case)
    # Some kernels sum otherwise where a file is mapped to unaligned memory.
    again = copy.deepcopy(type(model).from_pretrained(tmp_path).eval())
    assert torch.equal(logits(again, tiny), logits(model, tiny))
    assert again.config.quantization_config == model.config.quantization_config
    assert idle(again) == idle(model)


def idle(model):
    """Names of the parameters that do not require gradients; Whisper freezes its positions when it is made."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return frozen - {"encoder.embed_positions.weight"}


@pytest.mark.parametrize("model_type", ["bert", "mistral"])
def test_reloaded_models_are_pruned_again(tmp_path, model_type):
    model, tiny = saved(tmp_path, model_type, "a head")
    again = type(model).from_pretrained(tmp_path).eval()
    for each in (model, again):
        apply_plan(each, PruningPlan.for_model(each, value_dims={0: [0, 5]}, query_key_dims={1: [2]}))
    again.save_pretrained(tmp_path / "second")
    third = type(model).from_pretrained(tmp_path / "second").eval()
    for each in (again, third):
        assert torch.equal(logits(each, tiny), logits(model, tiny))


def test_rotary_pairs_are_marked(tmp_path):
    model, _ = saved(tmp_path, "mistral", "some")
    recorded = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["query_key_dims"]
    assert recorded == {"0": ["010", "111", "011", "111"], "1": ["111", "111", "111", "000"]}
    apply_plan(model, PruningPlan.for_model(model, query_key_dims={0: [2, 4]}))  # The first head has one pair left.
    assert model.config.quantization_config["query_key_dims"]["0"] == ["010", "101", "001", "111"]


def test_records_of_rotary_heads_may_be_numbers(tmp_path):
    """Of checkpoints that were written before pairs were marked: all query/key dimensions of a head, or none."""
    tiny = ZOO["llama"]
    model = without(tiny.model(torch.float32), tiny, {0: {1: (ALL, ALL), 2: (ALL, [])}, 1: {0: ([], [1])}})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["query_key_dims"] = {"0": [1, 0, 0, 1], "1": [1, 1, 1, 1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, tiny), logits(model, tiny))
    for each in (model, again):
        apply_plan(each, PruningPlan.for_model(each, query_key_dims={0: [1], 1: [0]}))
    assert torch.equal(logits(again, tiny), logits(model, tiny))
    assert again.config.quantization_config == model.config.quantization_config


def test_heads_that_were_gone_before_have_no_dimensions(tmp_path):
    tiny = ZOO["bert"]
    model = tiny.model(torch.float32)
    model.prune_heads({0: [2], 1: [0]})
    apply_plan(model, PruningPlan.for_model(model, value_dims={0: [0]}))
    assert not model.config.pruned_heads and "heads" not in model.config.quantization_config
    assert [left_of(group) for group in find_groups(model, ["value_dims"])] == [[3, 4, 0, 4], [0, 4, 4, 4]]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval(), tiny), logits(model, tiny))


WRONG = {
    "short": ({"0": [4, 4]}, "expected a list of 4 whole numbers"),
    "large": ({"0": [4, 4, 4, 99]}, "one for each of its heads, up to 4"),
    "negative": ({"0": [-1, 4, 4, 4]}, "whole numbers"),
    "no list": ({"0": 8}, "gives layer 0 8 value_dims"),
    "no numbers": ({"0": [True, 4, 4, 4]}, "whole numbers"),
    "no layer": ({"9": [4, 4, 4, 4]}, "has layers 0 to 1"),
    "other sizes": ({"0": [4, 4, 4, 4]}, "do not belong together"),
}


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_records_are_named(tmp_path, model_type, wrong):
    numbers, words = WRONG[wrong]
    with pytest.raises(ValueError, match=words):
        edited(tmp_path, lambda config, structure: structure["value_dims"].update(numbers), model_type)


WRONG_MARKS = {
    "no list": 3,
    "short list": 3 * ["111"],
    "counts": [3, 3, 3, 3],
    "truths": [True, True, True, True],
    "lists": 4 * [[1, 1, 1]],
    "few marks": ["111", "111", "111", "11"],
    "many marks": ["111", "111", "111", "1111"],
    "other marks": ["111", "111", "111", "12\n"],
}


@pytest.mark.parametrize("wrong", WRONG_MARKS)
def test_wrong_marks_are_named(tmp_path, wrong):
    def change(config, structure):
        structure["query_key_dims"]["0"] = WRONG_MARKS[wrong]

    with pytest.raises(ValueError, match="layer 0 .* query_key_dims; expected a list of 4 texts.* 3 marks each"):
        edited(tmp_path, change, "mistral")


@pytest.mark.parametrize("marks", [4 * ["111"], 4 * ["000"]], ids=["more", "fewer"])
def test_marks_of_other_sizes_are_named(tmp_path, marks):
    with pytest.raises(ValueError, match="q_proj.* do not belong together"):
        edited(tmp_path, lambda config, structure: structure["query_key_dims"].update({"0": marks}), "mistral")


def test_configs_of_other_pairs_are_named():
    model = without(ZOO["mistral"].model(), ZOO["mistral"], CASES["some"])
    model.config.quantization_config["query_key_dims"]["0"][0] = "100"  # As many.
    with pytest.raises(ValueError, match="records a different pruning of layer 0"):
        apply_plan(model, PruningPlan.for_model(model, value_dims={0: [0]}))


@pytest.mark.parametrize("also", [{"heads": {"0": 2}}, {}], ids=["heads", "pruned_heads alone"])
def test_records_of_both_views_are_named(tmp_path, also):
    def change(config, structure):
        structure.update(also)
        config["pruned_heads"] = {"0": [0, 1]}

    with pytest.raises(ValueError, match="records both heads and query_key_dims and value_dims"):
        edited(tmp_path, change)


def test_heads_no_longer_go_whole():
    model = without(ZOO["bert"].model(), ZOO["bert"], {0: {0: (ALL, ALL)}})
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="The heads of this BertForSequenceClassification have lost dimensions"):
        model.prune_heads({0: [1]})
    with pytest.raises(ValueError, match="have lost dimensions.*Name query_key_dims and value_dims in place of heads"):
        estimate_sensitivity(model, [ZOO["bert"].batch()], components=["heads", "neurons"], progress=False)
    with pytest.raises(ValueError, match="removes heads, but BertForSequenceClassification has components of"):
        PruningPlan({"heads": {0: [1]}}, "bert", {"heads": [4, 4]}).validate(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
