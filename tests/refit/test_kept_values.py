"""A refit within little memory equals one with much, its files are gone afterwards, and memory does not grow."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import make_batches
from transformers.modeling_outputs import BaseModelOutput
from zoo import ZOO

from hap_transformers import PruningPlan, apply_plan, reconstruct
from hap_transformers.refit.kept_values import KeptValues


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def refitted(model_type, **options):
    tiny = ZOO[model_type]
    dense = tiny.model()
    smaller = copy.deepcopy(dense)
    apply_plan(smaller, PruningPlan.for_model(smaller, heads={0: [1]}, neurons={0: [0, 3], 1: [2]}))
    reconstruct(smaller, dense, make_batches(tiny), progress=False, **options)
    return smaller


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "vit", "t5", "albert"])
def test_files_change_nothing(model_type, folder):
    expected = refitted(model_type).state_dict()
    for name, values in refitted(model_type, max_memory=1).state_dict().items():
        assert torch.equal(values, expected[name]), name
    assert not list(folder.iterdir())


def test_holds_up_to_the_limit_in_memory(folder):
    values = {
        name: BaseModelOutput(last_hidden_state=torch.randn(10), hidden_states=(torch.randn(5),)) for name in "abc"
    }
    with KeptValues(limit=130) as kept:  # Each takes 60 bytes.
        for name, value in values.items():
            kept[name] = value
        assert kept.held == 120
        assert len(list(Path(folder).rglob("*.pt"))) == 1
        for name, value in values.items():
            assert torch.equal(kept[name].last_hidden_state, value.last_hidden_state)
            assert torch.equal(kept[name].hidden_states[0], value.hidden_states[0])
        kept["a"] = torch.zeros(2)  # Makes room, and the newest value of a key counts.
        kept["c"] = torch.ones(3)
        assert torch.equal(kept["c"], torch.ones(3)) and kept.held == 8 + 60 + 12
        assert "d" not in kept
    assert not list(folder.iterdir())


def test_a_full_disk_is_named_and_the_model_left_as_it_was(folder, monkeypatch):
    tiny = ZOO["bert"]
    dense = tiny.model()
    smaller = copy.deepcopy(dense)
    apply_plan(smaller, PruningPlan.for_model(smaller, neurons={0: [0]}))
    before = copy.deepcopy(smaller.state_dict())
    saved = []

    def save(value, file):
        saved.append(file)
        if len(saved) > 6:
            raise OSError(28, "No space left on device")
        original(value, file)

    original = torch.save
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="hidden states do not fit .*TMPDIR"):
        reconstruct(smaller, dense, make_batches(tiny), max_memory=1, progress=False)
    assert all(torch.equal(values, before[name]) for name, values in smaller.state_dict().items())
    assert not list(folder.iterdir())


def test_bad_limits_are_named():
    with pytest.raises(ValueError, match="`max_memory` is a number of bytes"):
        refitted("bert", max_memory="much")
