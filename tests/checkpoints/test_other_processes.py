"""All pruned architectures load in other processes, with this package and, once exported, without it."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from convnets import CONVNETS, REPLACED, with_implants, with_one_emptied
from dims import CASES, without
from safetensors.torch import load_file, save_file
from tiny import make_model
from zoo import HEADS, NEURONS, ZOO

from hap_transformers import ARCHITECTURES, PruningPlan, apply_plan, export_remote_code
from hap_transformers.checkpoints import remote_code
from hap_transformers.checkpoints.remote_code import _classes_of


pytestmark = pytest.mark.slow
# Both are forked from a process that has imported Transformers, which takes most of the time, and no more.
LOAD = """
import multiprocessing, pathlib, sys
import torch, transformers.trainer
from safetensors.torch import load_file, save_file

def with_package(root):
    import hap_transformers
    for folder in pathlib.Path(root).iterdir():
        config = transformers.AutoConfig.from_pretrained(folder)
        dtype = getattr(torch, folder.name.split(" ")[1])
        model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=dtype)
        assert not model.training and not getattr(model, "is_quantized", False)
        save_file({"logits": model(**load_file(folder / "inputs")).logits}, folder / "reloaded")

def without_package(root):
    sys.modules["hap_transformers"] = None  # Importing it fails here, as if it were not installed.
    for folder in pathlib.Path(root).iterdir():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        wanted = "modeling_hap.Pruned" + config.architectures[0]
        auto_class = next(name for name, path in config.auto_map.items() if path == wanted)
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True, dtype="auto")
        save_file({"logits": model(**load_file(folder / "inputs")).logits}, folder / "reloaded")
        assert all(parameter.numel() or not parameter.requires_grad for parameter in model.parameters())
        if folder.name == "bert":
            again = pathlib.Path(root).with_name("saved_again")
            model.save_pretrained(again)
            again = getattr(transformers, auto_class).from_pretrained(again, trust_remote_code=True)
            assert all((p == q).all() for p, q in zip(model.parameters(), again.parameters(), strict=True))

assert "hap_transformers" not in sys.modules
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    pool.apply(with_package, sys.argv[1:2])
    pool.apply(without_package, sys.argv[2:])
"""
IMPLANTED = [f"{name}-implants" for name in REPLACED]
# A fused projection, grouped queries, relative positions.
WITH_DIMENSIONS = ("bert", "gpt2", "llama", "mpnet")


def prune(model):
    """Removes a whole attention block, a whole feed-forward block, and parts of the others."""
    plan = {"heads": {0: [1], 1: range(HEADS)}, "neurons": {0: range(NEURONS), 1: [0, 5]}}
    apply_plan(model, PruningPlan.for_model(model, **plan))
    return model


def with_an_entry_of_ones_own(patch):
    """A pruned model whose architecture has an entry that differs from the package's while a patch lasts."""
    entry = ARCHITECTURES["bert"]
    neurons = dataclasses.replace(entry.names["neurons"], inputs=("intermediate.dense", "absent"))
    names = {**entry.names, "neurons": neurons}
    patch.setitem(ARCHITECTURES, "bert", dataclasses.replace(entry, names=names))
    return prune(make_model(dtype=torch.float32))


def save(model, folder, inputs):
    """Leaves a checkpoint with inputs in a folder, and returns its logits here."""
    model.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs")
    return model(**inputs).logits


def save_all(root):
    """Saves all pruned architectures with inputs in folders of a root, and returns their logits here."""
    here = {}
    for dtype in (torch.float32, torch.bfloat16):
        named = str(dtype).removeprefix("torch.")
        for name, tiny in ZOO.items():
            folder = root / f"{name} {named}"
            here[folder.name] = save(prune(tiny.model(dtype)), folder, tiny.batch(dtype=dtype))
        for name, net in CONVNETS.items():
            folder = root / f"{name} {named}"
            here[folder.name] = save(with_one_emptied(net, dtype), folder, net.batch(dtype=dtype))
        for name, removed in REPLACED.items():
            folder, net = root / f"{name}-implants {named}", CONVNETS[name]
            here[folder.name] = save(with_implants(net, *removed, dtype), folder, net.batch(dtype=dtype))
    return here


def export(model, folder, inputs):
    """Leaves an exported checkpoint with inputs in a folder, and returns its logits here."""
    here = save(model, folder, inputs)
    export_remote_code(folder)
    return here


def export_all(root):
    """Exports checkpoints of all architectures and others, and returns their logits here."""
    here = {}
    for name, tiny in ZOO.items():
        with pytest.MonkeyPatch.context() as patch:
            if name == "bert":  # As if the loading release lacked a class that this one has.
                patch.setattr(
                    remote_code, "_classes_of", lambda c: {**_classes_of(c), "AutoModelForTelling": "BertTeller"}
                )
            here[name] = export(prune(tiny.model(torch.float32)), root / name, tiny.batch(dtype=torch.float32))
    for name, net in CONVNETS.items():
        model, batch = with_one_emptied(net, torch.float32), net.batch(dtype=torch.float32)
        here[name] = export(model, root / name, batch)
    for name, removed in REPLACED.items():
        model, batch = (
            with_implants(CONVNETS[name], *removed, torch.float32),
            CONVNETS[name].batch(dtype=torch.float32),
        )
        here[f"{name}-implants"] = export(model, root / f"{name}-implants", batch)
    with pytest.MonkeyPatch.context() as patch:
        here["own"] = export(with_an_entry_of_ones_own(patch), root / "own", ZOO["bert"].batch())
    for name in WITH_DIMENSIONS:
        model = without(ZOO[name].model(torch.float32), ZOO[name], CASES["a head"])
        here[f"{name}-dims"] = export(model, root / f"{name}-dims", ZOO[name].batch(dtype=torch.float32))
    model = prune(make_model(dtype=torch.float32))
    apply_plan(model, PruningPlan.for_model(model, embedding_dims={0: [1, 4]}))
    here["bert-embeddings"] = export(model, root / "bert-embeddings", ZOO["bert"].batch())
    return here


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Where the exported checkpoints are."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, exported):
    """The logits that each checkpoint has here and in the process that loaded it."""
    saved, elsewhere = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("elsewhere")
    here = {saved: save_all(saved), exported: export_all(exported)}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(elsewhere / "modules")}
    command = [sys.executable, "-P", "-c", LOAD, *map(str, here)]
    subprocess.run(command, check=True, env=environment, cwd=elsewhere, timeout=300)
    return {
        name: (value, load_file(root / name / "reloaded")["logits"])
        for root, values in here.items()
        for name, value in values.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*sorted(ZOO), *CONVNETS, *IMPLANTED])
def test_bit_equal_in_a_new_process(loaded, name, dtype):
    here, elsewhere = loaded[f"{name} {dtype}"]
    assert here.dtype == getattr(torch, dtype) and torch.equal(here, elsewhere)


@pytest.mark.parametrize("name", [*sorted(ZOO), *CONVNETS, *IMPLANTED])
def test_same_logits_without_the_package(loaded, name):
    here, elsewhere = loaded[name]
    assert torch.equal(here, elsewhere)


@pytest.mark.parametrize("name", WITH_DIMENSIONS)
def test_dimensions_of_heads_without_the_package(loaded, name):
    here, elsewhere = loaded[f"{name}-dims"]
    assert torch.equal(here, elsewhere)


def test_narrower_embeddings_without_the_package(loaded):
    here, elsewhere = loaded["bert-embeddings"]
    assert torch.equal(here, elsewhere)


def test_an_entry_of_ones_own_is_exported(exported, loaded):
    here, elsewhere = loaded["own"]
    assert "absent" in (exported / "own" / "modeling_hap.py").read_text()
    assert "absent" not in (exported / "bert" / "modeling_hap.py").read_text()
    assert torch.equal(here, elsewhere)
