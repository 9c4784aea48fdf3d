"""Files of the first release are read as that release read them; its README in `fixtures` says how they were made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from zoo import HEADS, NEURONS, ZOO

from hap_transformers import (
    HapConfig,
    LatencyTable,
    PruningPlan,
    Sensitivity,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
)
from hap_transformers.components.groups import find_groups


FOLDER = Path(__file__).parent / "fixtures" / "first_release"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
TENSORS = load_file(FOLDER / "expected.safetensors")
# Names of the lists of layers in the first release, and their field and kind now.
LISTS = {
    "heads": ("scores", "heads"),
    "neurons": ("scores", "neurons"),
    "head_order": ("order", "heads"),
    "neuron_order": ("order", "neurons"),
    "head_traces": ("traces", "heads"),
    "neuron_traces": ("traces", "neurons"),
    "head_stderr": ("stderr", "heads"),
    "neuron_stderr": ("stderr", "neurons"),
}
FIRST_OF_GPT2 = {"heads": {0: [2], 1: [0]}, "neurons": {0: [0, 7], 1: range(8)}}
LABELLED = {**ZOO["bert"].batch(8), "labels": torch.arange(8) % 2}
BATCHES = [{name: value[part] for name, value in LABELLED.items()} for part in (slice(3), slice(3, 5), slice(5, 8))]


def files(pattern):
    found = sorted(FOLDER.glob(pattern))
    assert found, pattern
    return pytest.mark.parametrize("file", found, ids=lambda file: file.stem)


def facts_of(name):
    """The expected plain values. Lists that some scores do not have are `None` there."""
    facts = dict(EXPECTED[name])
    assert not any(facts.pop(old, None) for old in (*LISTS, "head_interactions"))
    return facts


def assert_tensors(found, prefix, **tolerance):
    """Scores have the expected tensors and no others."""
    for old, (field, kind) in LISTS.items():
        expected = [TENSORS[name] for i in range(2) if (name := f"{prefix}.{old}.{i}") in TENSORS]
        torch.testing.assert_close(getattr(found, field).get(kind, []), expected, **tolerance)
    torch.testing.assert_close(found.interactions, TENSORS.get(f"{prefix}.head_interactions"), **tolerance)


@files("scores-*.safetensors")
def test_scores(file):
    found = Sensitivity.load(file)
    assert_tensors(found, file.stem, rtol=0, atol=0)
    plain = facts_of(file.stem)
    assert {"method", "num_examples", "reliability", "seconds"} <= plain.keys()
    assert {name: getattr(found, name) for name in plain} == plain
    assert found.comparable and found.foresees_refit == (found.method == "kronecker")


@files("plan-*.json")
def test_plans(file):
    plan, expected = PruningPlan.load(file), dict(EXPECTED[file.stem])
    for kind, counts in (("heads", "original_heads"), ("neurons", "num_neurons")):
        assert {str(layer): gone for layer, gone in plan.removed[kind].items()} == expected.pop(kind)
        assert plan.original[kind] == expected.pop(counts)
    assert {str(layer): rank for layer, rank in plan.implants.items()} == expected.pop("implants")
    assert {name: getattr(plan, name) for name in expected} == expected and expected.keys() >= {"promise", "budget"}
    model = ZOO[plan.model_type].model(torch.float32)
    if plan.model_type == "gpt2":
        apply_plan(model, PruningPlan.for_model(model, **FIRST_OF_GPT2))
    apply_plan(model, plan)
    parameters = sum(p.numel() for p in model.parameters())
    assert plan.promise.get("parameters", parameters) == parameters


def test_the_plan_of_loaded_scores_is_the_same():
    scores = Sensitivity.load(FOLDER / "scores-kronecker.safetensors")
    plan = plan_pruning(scores, ZOO["bert"].model(torch.float32), ratio=0.4, neuron_multiple=1)
    assert plan == PruningPlan.load(FOLDER / "plan-kronecker.json")


@files("checkpoint-*")
def test_checkpoints(file):
    name, expected = file.name.removeprefix("checkpoint-"), EXPECTED[file.name]
    model = getattr(transformers, expected["class"]).from_pretrained(file)
    logits = model(**ZOO[name].batch(dtype=torch.float32)).logits
    torch.testing.assert_close(logits, TENSORS[f"{file.name}.logits"])
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    assert {str(layer): heads for layer, heads in model.config.pruned_heads.items()} == expected["pruned_heads"]
    assert json.loads(model.config.to_json_string())["quantization_config"] == expected["structure"]
    # The record fits, so the model can be pruned further.
    head = next(group.kept[0] for group in find_groups(model, ["heads"]) if group.num_components)
    model.prune_heads({layer: [head] for layer in range(2)})
    assert sum(p.numel() for p in model.parameters()) < expected["parameters"]


def test_an_interrupted_run(tmp_path):
    """This release resumes it, as the release that wrote the file would have."""
    state, scored = Path(shutil.copy(FOLDER / "state-kronecker.safetensors", tmp_path)), []

    def loss_fn(model, batch):
        scored.append(len(batch["labels"]))
        return model(**batch).loss

    settings = {"state_file": state, "loss_fn": loss_fn, "progress": False}
    found = estimate_sensitivity(ZOO["bert"].model(torch.float64), BATCHES, "kronecker", **settings)
    assert scored == [3] and not state.exists()  # The first two batches are not scored again.
    assert_tensors(found, state.stem, rtol=1e-7, atol=1e-12)
    plain = facts_of(state.stem)
    assert found.reliability == pytest.approx(plain.pop("reliability"))
    assert {name: getattr(found, name) for name in plain} == plain


def test_a_latency_table():
    table, expected = LatencyTable.load(FOLDER / "latency_table.json"), EXPECTED["latency_table"]
    assert table.counts == {"heads": expected["head_counts"], "neurons": expected["neuron_counts"]}
    assert table.seconds == {"heads": expected["head_seconds"], "neurons": expected["neuron_seconds"]}
    assert {name: getattr(table, name) for name in ("model_type", "outside", "batch")} == {
        name: expected[name] for name in ("model_type", "outside", "batch")
    }
    assert max(table.counts["heads"]) == HEADS and max(table.counts["neurons"]) == NEURONS


def test_a_configuration():
    config, expected = HapConfig.load(FOLDER / "hap_config.json"), EXPECTED["hap_config"]
    assert {name: getattr(config, name) for name in expected} == expected
    assert config == HapConfig(ridge=0.01)  # It still is the default, but for language models.
