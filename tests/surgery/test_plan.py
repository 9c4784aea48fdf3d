"""Plans as data: files, and checks against a model."""

import json
import re

import pytest
from tiny import changed_plan, make_model
from zoo import HEADS, LAYERS, NEURONS

from hap_transformers import PruningPlan, apply_plan, prune_heads


def make_plan():
    return PruningPlan.for_model(make_model(), heads={0: [0, 2], 1: [0, 1]}, budget="heads", ratio=0.5)


def test_save_and_load(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert '"0": [ 0, 2 ]' in (tmp_path / "plan.json").read_text()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"heads": {"a": [1]}}', '{"heads": {}, "extra": 1}'])
def test_loading_something_else(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="is not a pruning plan"):
        PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"removed": {"layers": {0: [1]}}},
            "The plan removes layers, but BertForSequenceClassification has components of the kinds heads, neurons "
            "only. To remove a layer, name all its heads and neurons.",
        ),
        ({"model_type": "roberta"}, "The plan is for a 'roberta'"),
        ({"original": {"heads": [HEADS]}}, "Make a plan for this model"),
        ({"removed": {"heads": {0: [1, 1]}}}, "twice"),
        ({"removed": {"heads": {LAYERS: [0]}}}, "layers 0 to 1"),
        ({"removed": {"heads": {0: [HEADS]}}}, "numbered 0 to 3"),
        ({"removed": {"neurons": {0: [1]}}, "implants": {0: 2}}, "implants rank 2 in layer 0, where it removes 1"),
        ({"implants": {1: 1}}, "implants rank 1 in layer 1, where it removes 0"),
        ({"promise": {"parameters": 1}}, "promises 1 parameters"),
    ],
)
def test_validate(change, message):
    plan = changed_plan(make_plan(), **change)
    with pytest.raises(ValueError, match=message):
        plan.validate(make_model())


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"removed": {"head": {"0": [1]}}},
            "removes head, but BertForSequenceClassification has components of the kinds heads",
        ),
        ({"removed": {"heads": {"0": [1], "00": [2]}}}, "Layer 0 is named twice"),
        ({"implants": {"0": 1, "00": 2}}, "Layer 0 is named twice"),
    ],
    ids=["unknown", "twice", "implants twice"],
)
def test_a_file_with_names_that_are_wrong(tmp_path, fields, message):
    file = tmp_path / "plan.json"
    make_plan().save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    model = make_model()
    with pytest.raises(ValueError, match=message):
        apply_plan(model, PruningPlan.load(file))
    assert model.config.to_dict() == make_model().config.to_dict()


@pytest.mark.parametrize("numbers", [1, [1.0], [True], ["1"], None])
def test_what_are_no_numbers_is_named(numbers):
    words = f"Cannot remove {numbers!r} from layer 0: give a list of whole numbers"
    with pytest.raises(TypeError, match=re.escape(words)):
        PruningPlan.for_model(make_model(), heads={0: numbers})
    with pytest.raises(TypeError, match=re.escape(words)):
        prune_heads(make_model(), {0: numbers})


def test_an_emptied_layer_has_none_left():
    model = make_model()
    apply_plan(model, PruningPlan.for_model(model, neurons={1: range(NEURONS)}))
    with pytest.raises(ValueError, match=r"Cannot prune neurons \[0\] of layer 1: it has none left. Nothing"):
        PruningPlan.for_model(model, neurons={1: [0]})


def test_a_printed_plan_has_numbers_instead_of_components():
    plan = PruningPlan.for_model(make_model(), heads={0: [1, 2]}, neurons={1: range(20)}, budget="params", ratio=0.5)
    assert repr(plan) == (
        "PruningPlan(removes 2 of 8 heads, 20 of 48 neurons; model_type='bert', budget='params', ratio=0.5)"
    )
    assert "removes nothing" in repr(PruningPlan.for_model(make_model()))
