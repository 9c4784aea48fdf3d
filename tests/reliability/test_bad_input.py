"""Every public entry point, given something wrong, names it and the remedy, and leaves model, files and RNG alone."""

import copy
import re
from types import SimpleNamespace

import datasets
import pytest
import torch
from compare_glue import main as compare_glue
from conftest import make_batch, make_model
from run_glue_hap import main as run_glue_hap
from spoiled import a_plan, files
from test_scripts import flags, model_dir, own_files  # noqa: F401
from wrong_inputs import TABLE, trainer

import hap_transformers as hap


@pytest.fixture
def here(tmp_path):
    """A model, a batch, and checkpoints of it, dense and pruned."""
    model = make_model()
    own = SimpleNamespace(model=model, dense=copy.deepcopy(model), batch=make_batch(), folder=tmp_path)
    own.saved, own.dense_saved = tmp_path / "pruned", tmp_path / "dense"
    smaller = copy.deepcopy(model)
    hap.apply_plan(smaller, a_plan(own))
    smaller.save_pretrained(own.saved)
    model.save_pretrained(own.dense_saved)
    own.weights, own.files = copy.deepcopy(model.state_dict()), files(tmp_path)
    return own


def test_the_table_is_long_enough(tell):
    tell(wrong_inputs=len(TABLE))
    assert len(TABLE) >= 60 and len({wrong.name for wrong in TABLE}) == len(TABLE)


@pytest.mark.parametrize("wrong", TABLE, ids=lambda wrong: wrong.name)
def test_wrong_input_is_named_and_changes_nothing(here, wrong):
    state, training = torch.get_rng_state(), here.model.training
    with pytest.raises(wrong.error) as caught:
        wrong.action(here)
    assert re.search(wrong.message, str(caught.value), re.DOTALL), f"{type(caught.value).__name__}: {caught.value}"
    now = here.model.state_dict()
    assert now.keys() == here.weights.keys() and here.model.training is training
    for name, tensor in here.weights.items():
        assert torch.equal(now[name].nan_to_num(), tensor.nan_to_num()), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in here.model.parameters())
    assert files(here.folder) == here.files
    if "trainer" not in wrong.name:  # Trainer sets the seed when it is made.
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("calls", [0, 7, 10, 11, 13])  # Costs take five calls each; then the refit begins.
@pytest.mark.parametrize(
    "removed",
    [
        {"heads": {0: [1]}},
        {"heads": {0: range(4)}},
        {"neurons": {1: range(24)}},
        {"neurons": {0: range(8)}, "implants": {0: 4}},
    ],
    ids=["some", "all heads", "all neurons", "implant"],
)
def test_a_refit_that_breaks_off_leaves_the_model_as_it_was(here, error, calls, removed):
    """After surgery, amid the refit: structure, weights, config and parameters are those from before."""
    own, left = trainer(here, model=here.model.float()), iter(range(calls))
    own.train()
    before, parameters = copy.deepcopy(here.model), list(here.model.parameters())
    compute_loss = own.compute_loss

    def breaking_off(*args, **kwargs):
        if next(left, None) is None:
            raise error
        return compute_loss(*args, **kwargs)

    plan = hap.PruningPlan.for_model(here.model, **removed)
    own.compute_loss = breaking_off
    with pytest.raises(error):
        own.prune(plan)
    assert all(p is q for p, q in zip(parameters, here.model.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(parameters, before.parameters(), strict=True))
    assert here.model.config.to_dict() == before.config.to_dict() and own.pruning_plan is None
    logits = [model.eval()(**here.batch).logits for model in (here.model, before)]
    assert torch.equal(*logits)
    own.compute_loss = compute_loss
    own.prune(plan)
    own.train()


def test_costs_that_cannot_be_measured_leave_the_model_as_it_was(here):
    own = trainer(here, model=here.model.float())
    before, note_costs = copy.deepcopy(here.model), own._note_costs

    def breaking_off(model, size):
        if size == "pruned":
            raise KeyboardInterrupt
        note_costs(model, size)

    own._note_costs = breaking_off
    with pytest.raises(KeyboardInterrupt):
        own.prune(hap.PruningPlan.for_model(here.model, heads={0: [1]}))
    assert all(torch.equal(p, q) for p, q in zip(here.model.parameters(), before.parameters(), strict=True))
    assert torch.equal(*(model.eval()(**here.batch).logits for model in (here.model, before)))


@pytest.mark.parametrize(
    "script, more, message",
    [
        (run_glue_hap, ["--ratio", "nan"], "`ratio`"),
        (run_glue_hap, ["--max_train_samples", "0"], "no training examples"),
        (run_glue_hap, ["--model_name_or_path", "./nowhere"], "nowhere"),
        (run_glue_hap, ["--ratio", "0.999"], "cannot be met"),
        (compare_glue, ["--methods", "magic"], r"Unknown \['magic'\]; methods are hap"),
        (compare_glue, ["--tasks", "squad"], "tasks mrpc"),
        (compare_glue, ["--ratios", "1.5"], "Ratios are shares"),
        (compare_glue, ["--budget", "watts"], "not by budget 'watts'"),
        (compare_glue, ["--preset", "slow"], "Unknown preset 'slow'; choose one of quick"),
        (compare_glue, ["--data_dir", "nowhere"], "lacks nowhere"),
    ],
)
def test_wrong_flags_are_named(tmp_path, model_dir, script, more, message):  # noqa: F811
    own = flags(tmp_path, model_dir, *own_files(tmp_path)) if script is run_glue_hap else ["--data_dir", str(tmp_path)]
    own += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises((ValueError, OSError), match=message):
        script([*own, *more])
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("unwritable", ["output", "cache"])
def test_folders_that_cannot_be_written_are_named_before_any_training(tmp_path, model_dir, monkeypatch, unwritable):  # noqa: F811
    """Below a file nothing can be made, not even by root."""
    (tmp_path / "in_the_way").write_text("")
    below, trained = tmp_path / "in_the_way" / unwritable, []
    monkeypatch.setattr(hap.HapTrainer, "train", lambda *args, **kwargs: trained.append(1))
    own = flags(tmp_path, model_dir, *own_files(tmp_path))
    if unwritable == "cache":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(below))
    else:
        own += ["--output_dir", str(below)]
    with pytest.raises(OSError, match=f"in_the_way/{unwritable}"):
        run_glue_hap(own)
    assert not trained
