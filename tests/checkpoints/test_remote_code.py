"""Exported checkpoints load where this package cannot be imported."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from dims import CASES, without
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForSequenceClassification
from zoo import HEADS, NEURONS, ZOO

from hap_transformers import ARCHITECTURES, PruningPlan, apply_plan, export_remote_code
from hap_transformers.checkpoints import remote_code
from hap_transformers.checkpoints.remote_code import _classes_of


# Importing the package fails here, as if it were not installed.
LOAD = """
import pathlib, sys
sys.modules["hap_transformers"] = None
import transformers
from safetensors.torch import load_file, save_file
for folder in pathlib.Path(sys.argv[1]).iterdir():
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    wanted = "modeling_hap.Pruned" + config.architectures[0]
    auto_class = next(name for name, path in config.auto_map.items() if path == wanted)
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True, dtype="auto")
    save_file({"logits": model(**load_file(folder / "inputs")).logits}, folder / "reloaded")
    assert all(parameter.numel() or not parameter.requires_grad for parameter in model.parameters())
    if folder.name == "bert":
        again = pathlib.Path(sys.argv[1]).with_name("saved_again")
        model.save_pretrained(again)
        again = getattr(transformers, auto_class).from_pretrained(again, trust_remote_code=True)
        assert all((p == q).all() for p, q in zip(model.parameters(), again.parameters(), strict=True))
"""


def prune(model):
    plan = {"heads": {0: [1], 1: range(HEADS)}, "neurons": {0: range(NEURONS), 1: [0, 5]}}
    apply_plan(model, PruningPlan.for_model(model, **plan))
    return model


def load_without_package(root, tmp_path):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": "",
    }
    command = [sys.executable, "-P", "-c", LOAD, str(root)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)


def export(model, folder, inputs):
    """Leaves an exported checkpoint with inputs in a folder, and returns its logits here."""
    model.save_pretrained(folder)
    export_remote_code(folder)
    save_file(inputs, folder / "inputs")
    return model(**inputs).logits


def with_an_entry_of_ones_own(patch):
    """A pruned model whose architecture has an entry that differs from the package's while a patch lasts."""
    entry = ARCHITECTURES["bert"]
    neurons = dataclasses.replace(entry.names["neurons"], inputs=("intermediate.dense", "absent"))
    names = {**entry.names, "neurons": neurons}
    patch.setitem(ARCHITECTURES, "bert", dataclasses.replace(entry, names=names))
    return prune(make_model(dtype=torch.float32))


# A fused projection, grouped queries, relative positions.
WITH_DIMENSIONS = ("bert", "gpt2", "llama", "mpnet")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Where all checkpoints are, and the logits that each has here and in a process without the package."""
    root, here = tmp_path_factory.mktemp("exported"), {}
    for name, tiny in ZOO.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "bert":  # As if the loading release lacked a class that this one has.
                patch.setattr(
                    remote_code, "_classes_of", lambda c: {**_classes_of(c), "AutoModelForTelling": "BertTeller"}
                )
            here[name] = export(prune(tiny.model(torch.float32)), root / name, tiny.batch(dtype=torch.float32))
    with pytest.MonkeyPatch.context() as patch:
        here["own"] = export(with_an_entry_of_ones_own(patch), root / "own", ZOO["bert"].batch())
    for name in WITH_DIMENSIONS:
        model = without(ZOO[name].model(torch.float32), ZOO[name], CASES["a head"])
        here[f"{name}-dims"] = export(model, root / f"{name}-dims", ZOO[name].batch(dtype=torch.float32))
    load_without_package(root, tmp_path_factory.mktemp("elsewhere"))
    return root, {name: (value, load_file(root / name / "reloaded")["logits"]) for name, value in here.items()}


def test_same_logits_without_the_package(exported, model_type):
    here, elsewhere = exported[1][model_type]
    assert torch.equal(here, elsewhere)


@pytest.mark.parametrize("name", WITH_DIMENSIONS)
def test_dimensions_of_heads_without_the_package(exported, name):
    here, elsewhere = exported[1][f"{name}-dims"]
    assert torch.equal(here, elsewhere)


def test_an_entry_of_ones_own_is_exported(exported):
    root, (here, elsewhere) = exported[0], exported[1]["own"]
    assert "absent" in (root / "own" / "modeling_hap.py").read_text()
    assert "absent" not in (root / "bert" / "modeling_hap.py").read_text()
    assert torch.equal(here, elsewhere)


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


def test_refuses_what_cannot_be_exported(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json; save the model there first"):
        export_remote_code(tmp_path)
    make_model(dtype=torch.float32).save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="records no pruning"):
        export_remote_code(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == before
    assert not list(tmp_path.glob("*.py"))
