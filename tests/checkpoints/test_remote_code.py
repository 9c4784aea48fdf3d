"""Exported checkpoints load with this package, too; `test_other_processes.py` loads them without it."""

import json

import pytest
import torch
from tiny import make_model
from transformers import AutoModelForSequenceClassification
from zoo import HEADS, NEURONS, ZOO

from hap_transformers import PruningPlan, apply_plan, export_remote_code


def prune(model):
    plan = {"heads": {0: [1], 1: range(HEADS)}, "neurons": {0: range(NEURONS), 1: [0, 5]}}
    apply_plan(model, PruningPlan.for_model(model, **plan))
    return model


def test_loads_with_the_package_too(tmp_path):
    """Trusted code loads the classes beside the weights; otherwise the package's loader runs."""
    model = prune(make_model(dtype=torch.float32))
    model.save_pretrained(tmp_path)
    export_remote_code(tmp_path)
    for trust in (True, False):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=trust)
        inputs = ZOO["bert"].batch()
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        assert type(again).__name__ == ("Pruned" if trust else "") + "BertForSequenceClassification"


def test_what_saves_no_code_names_none(tmp_path):
    """A folder whose config names code that it lacks would not load where that is trusted."""
    model = prune(make_model(dtype=torch.float32))
    model.config.auto_map = {"AutoModelForCTC": "own_code.OwnModel"}
    model.save_pretrained(tmp_path / "exported")
    export_remote_code(tmp_path / "exported")
    for trust in (True, False):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported", trust_remote_code=trust)
        again.save_pretrained(tmp_path / str(trust))
        named = json.loads((tmp_path / str(trust) / "config.json").read_text())["auto_map"]
        assert named["AutoModelForCTC"] == "own_code.OwnModel"
        assert ("AutoModelForSequenceClassification" in named) == trust
        assert (tmp_path / str(trust) / "modeling_hap.py").is_file() == trust
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(trust), trust_remote_code=True)
        assert torch.equal(loaded(**ZOO["bert"].batch()).logits, model(**ZOO["bert"].batch()).logits)


def test_refuses_what_cannot_be_exported(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json; save the model there first"):
        export_remote_code(tmp_path)
    make_model(dtype=torch.float32).save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="records no pruning"):
        export_remote_code(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == before
    assert not list(tmp_path.glob("*.py"))
