"""Every public entry point names a wrong input and the remedy, and leaves model, files and RNG unchanged."""

import copy
import re
from types import SimpleNamespace

import datasets
import pytest
import torch
from script_inputs import flags, own_files
from spoiled import a_plan, files
from tiny import make_batch, make_model
from wrong_inputs import TABLE, trainer

import hap_transformers as hap
from glue_scripts.compare_glue.run import main as compare_glue
from glue_scripts.run_glue_hap import main as run_glue_hap


@pytest.fixture
def here(tmp_path):
    """A model, a batch, and checkpoints of it, dense and pruned."""
    model = make_model()
    given = SimpleNamespace(model=model, dense=copy.deepcopy(model), batch=make_batch(), folder=tmp_path)
    given.saved, given.dense_saved = tmp_path / "pruned", tmp_path / "dense"
    smaller = copy.deepcopy(model)
    hap.apply_plan(smaller, a_plan(given))
    smaller.save_pretrained(given.saved)
    model.save_pretrained(given.dense_saved)
    given.weights, given.files = copy.deepcopy(model.state_dict()), files(tmp_path)
    return given


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
    if "trainer" not in wrong.name:  # Making a Trainer sets the seed.
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(
    "calls", [0, 7, 10, 11, 13]
)  # Each costs measurement takes five calls, then the refit begins.
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
    """A refit that is interrupted after surgery restores structure, weights, config and parameters."""
    hap_trainer, left = trainer(here, model=here.model.float()), iter(range(calls))
    hap_trainer.train()
    before, parameters = copy.deepcopy(here.model), list(here.model.parameters())
    compute_loss = hap_trainer.compute_loss

    def breaking_off(*args, **kwargs):
        if next(left, None) is None:
            raise error
        return compute_loss(*args, **kwargs)

    plan = hap.PruningPlan.for_model(here.model, **removed)
    hap_trainer.compute_loss = breaking_off
    with pytest.raises(error):
        hap_trainer.prune(plan)
    assert all(p is q for p, q in zip(parameters, here.model.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(parameters, before.parameters(), strict=True))
    assert here.model.config.to_dict() == before.config.to_dict() and hap_trainer.pruning_plan is None
    logits = [model.eval()(**here.batch).logits for model in (here.model, before)]
    assert torch.equal(*logits)
    hap_trainer.compute_loss = compute_loss
    hap_trainer.prune(plan)
    hap_trainer.train()


def test_costs_that_cannot_be_measured_leave_the_model_as_it_was(here):
    hap_trainer = trainer(here, model=here.model.float())
    before, note_costs = copy.deepcopy(here.model), hap_trainer._note_costs

    def breaking_off(model, size):
        if size == "pruned":
            raise KeyboardInterrupt
        note_costs(model, size)

    hap_trainer._note_costs = breaking_off
    with pytest.raises(KeyboardInterrupt):
        hap_trainer.prune(hap.PruningPlan.for_model(here.model, heads={0: [1]}))
    assert all(torch.equal(p, q) for p, q in zip(here.model.parameters(), before.parameters(), strict=True))
    assert torch.equal(*(model.eval()(**here.batch).logits for model in (here.model, before)))


@pytest.mark.parametrize(
    "script, more, message",
    [
        (run_glue_hap, ["--ratio", "nan"], "`ratio`"),
        (run_glue_hap, ["--max_train_samples", "0"], "no training examples"),
        (run_glue_hap, ["--model_name_or_path", "./nowhere"], "nowhere"),
        (run_glue_hap, ["--ratio", "0.999"], "cannot be met"),
        (compare_glue, ["--methods", "magic"], r"Unknown \['magic'\]; methods are kronecker"),
        (compare_glue, ["--tasks", "squad"], "tasks mrpc"),
        (compare_glue, ["--ratios", "1.5"], "Ratios are shares"),
        (compare_glue, ["--budget", "watts"], "not by budget 'watts'"),
        (compare_glue, ["--preset", "slow"], "Unknown preset 'slow'; choose one of quick"),
        (compare_glue, ["--data_dir", "nowhere"], "lacks nowhere"),
    ],
)
def test_wrong_flags_are_named(tmp_path, model_dir, script, more, message):
    arguments = (
        flags(tmp_path, model_dir, *own_files(tmp_path)) if script is run_glue_hap else ["--data_dir", str(tmp_path)]
    )
    arguments += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises((ValueError, OSError), match=message):
        script([*arguments, *more])
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("unwritable", ["output", "cache"])
def test_folders_that_cannot_be_written_are_named_before_any_training(tmp_path, model_dir, monkeypatch, unwritable):
    """Nobody can make a folder below a file, not even root."""
    (tmp_path / "in_the_way").write_text("")
    below, trained = tmp_path / "in_the_way" / unwritable, []
    monkeypatch.setattr(hap.HapTrainer, "train", lambda *args, **kwargs: trained.append(1))
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    if unwritable == "cache":  # Only data of `datasets` goes there.
        rows = datasets.Dataset.from_dict({"sentence": ["good film", "bad plot"] * 8, "label": [1, 0] * 8})
        rows = rows.cast_column("label", datasets.ClassLabel(names=["negative", "positive"]))
        for split in ("train", "validation"):
            rows.to_parquet(tmp_path / "data" / "sst2" / f"{split}.parquet")
        arguments = flags(tmp_path, model_dir, "--task_name", "sst2", "--data_dir", str(tmp_path / "data"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(below))
    else:
        arguments = [*flags(tmp_path, model_dir, *own_files(tmp_path)), "--output_dir", str(below)]
    with pytest.raises(OSError, match=f"in_the_way/{unwritable}"):
        run_glue_hap(arguments)
    assert not trained
