"""Which weights a recovery keeps, where what is trained or measured changes, and where batches have no labels."""

from itertools import chain, repeat

import pytest
import torch
from torch.nn import functional as F
from trainers import Rows
from transformers import TrainerCallback
from watched import HARMS, ROWS, Interrupted, Notes, pruned_trainer, same

from hap_transformers.reporting.wording import recovery_in_words
from hap_transformers.training import best_state, watching
from hap_transformers.training.held_out import set_aside


SAVING = {"save_strategy": "steps", "save_steps": 5}


def label_loss(trainer, weights, rows):
    """The loss of the labels of some rows, of a model with some weights."""
    trainer.model.load_state_dict(weights)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        return F.cross_entropy(trainer.model.eval()(**batch).logits, labels).item()


def test_a_resumption_that_measures_something_else_judges_anew(tmp_path, monkeypatch):
    """A new process has no dense model: values of the distance to it say nothing of the loss of the labels."""
    heard = []
    monkeypatch.setattr(best_state.logger, "warning", heard.append)
    distances = {0: 1e-9, 8: 1.0, 15: 1.0}
    with monkeypatch.context() as patch:
        patch.setattr(watching, "_distance", lambda trainer, *args: distances[trainer.state.global_step])
        cut = pruned_trainer(tmp_path, notes=Notes(stop=12), **SAVING)
        with pytest.raises(Interrupted):
            cut.train()
    again = pruned_trainer(tmp_path, **SAVING)
    again.teacher = None
    again.train(resume_from_checkpoint=True)
    assert len(heard) == 1 and "judges them and those of the checkpoint anew" in heard[0]
    kept = {name: tensor.clone() for name, tensor in again.model.state_dict().items()}
    found, (_, held_out) = again.results["recovery"], set_aside(ROWS, again.args.seed)
    before = label_loss(again, cut.before, held_out)
    trained = [label_loss(again, weights, held_out) for weights in (cut.notes.after[10], again.notes.after[15])]
    assert min(trained) < before and found["before"] == pytest.approx(before, rel=1e-5)
    assert found["after"] == pytest.approx(min(trained), rel=1e-5)
    assert same(cut.notes.after[10] if found["step"] == 10 else again.notes.after[15], kept)


def test_a_resumption_by_another_metric_keeps_the_best_checkpoint(tmp_path, monkeypatch):
    """The metric of the best checkpoint so far is not that of the weights in the model."""
    heard = []
    monkeypatch.setattr(best_state.logger, "warning", heard.append)
    saving = {**SAVING, "eval_strategy": "steps", "eval_steps": 5}
    with pytest.raises(Interrupted):
        pruned_trainer(tmp_path, notes=Notes(stop=7), **saving).train()
    wanted = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "greater_is_better": True}
    again = pruned_trainer(tmp_path, **saving, **wanted)
    again.train(resume_from_checkpoint=True)
    best = again.state.best_global_step
    assert len(heard) == 1 and "chosen by another metric" in heard[0]
    assert best in (10, 15) and same(again.notes.after[best], again.model.state_dict())


def test_batches_without_a_label_that_counts_have_no_loss(tmp_path, monkeypatch):
    heard, rows = [], Rows(60)
    monkeypatch.setattr(watching.logger, "warning", heard.append)
    held_out = set_aside(rows, 42)[1]
    held_out[0]["labels"].fill_(-100)
    trainer = pruned_trainer(tmp_path, config={"distillation": 0.0}, rows=rows, per_device_train_batch_size=1)
    trainer.train()
    found, counted = trainer.results["recovery"], [row for row in held_out if row["labels"] >= 0]
    assert len(counted) == len(held_out) - 1 and found["step"] and not heard
    kept = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert found["before"] == pytest.approx(label_loss(trainer, trainer.before, counted), rel=1e-5)
    assert found["after"] == pytest.approx(label_loss(trainer, kept, counted), rel=1e-5)


def test_a_recovery_that_cannot_be_judged_is_kept_and_says_so(tmp_path, monkeypatch):
    heard, rows = [], Rows(60)
    monkeypatch.setattr(watching.logger, "warning", heard.append)
    for row in set_aside(rows, 42)[1]:
        row["labels"].fill_(-100)
    trainer = pruned_trainer(tmp_path, config={"distillation": 0.0}, rows=rows)
    trainer.train()
    assert len(heard) == 1 and "is never a finite number" in heard[0] and "the loss of the labels" in heard[0]
    assert "recovery" not in trainer.results
    assert same(trainer.notes.after[15], trainer.model.state_dict())


@pytest.mark.parametrize("best_step", [0, 8])
@pytest.mark.parametrize("at_first", [True, False], ids=["freezes", "unfreezes"])
def test_callbacks_that_freeze_and_unfreeze(tmp_path, monkeypatch, at_first, best_step):
    """All weights go back to those of one step."""

    class Changes(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.bert.encoder.requires_grad_(at_first)

        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 10:
                model.bert.encoder.requires_grad_(not at_first)

    values = {0: 2.0, 8: 2.0, 15: 3.0, best_step: 1.0}
    monkeypatch.setattr(watching, "_distance", lambda trainer, *args: values[trainer.state.global_step])
    trainer = pruned_trainer(tmp_path, **SAVING)
    trainer.add_callback(Changes())
    trainer.train()
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    moved = [not torch.equal(trainer.before[name], trainer.notes.after[step][name]) for step in (10, 15)]
    assert moved == [at_first, True]
    assert same(trainer.notes.after.get(best_step, trainer.before), trainer.model.state_dict())


@pytest.mark.parametrize("distillation", [0.5, 1.0])
def test_what_is_undone_although_the_labels_liked_it(tmp_path, monkeypatch, distillation):
    """As where a model is pruned before it is fine-tuned: all training leads away from the dense model."""
    heard = []
    monkeypatch.setattr(watching.logger, "warning", heard.append)
    distances = {0: 0.0, 8: 1.0, 15: 1.0}
    monkeypatch.setattr(watching, "_distance", lambda trainer, *args: distances[trainer.state.global_step])
    trainer = pruned_trainer(tmp_path, config={"distillation": distillation})
    trainer.train()
    assert same(trainer.before, trainer.model.state_dict())
    held_out = set_aside(ROWS, trainer.args.seed)[1]
    before, after = (label_loss(trainer, weights, held_out) for weights in (trainer.before, trainer.notes.after[15]))
    assert len(heard) == 1 and "is undone" in heard[0] and after < before
    told = f"The loss of the labels there had fallen from {before:.3g} to {after:.3g}."
    assert (told in heard[0]) == (distillation < 1)


@pytest.mark.parametrize("after, told", [(1.1299, False), (1.12, True)])
def test_a_loss_that_fell_by_less_than_is_printed_has_not(tmp_path, monkeypatch, after, told):
    heard, losses = [], iter([after, 1.1301])  # The last weights are measured before they are undone.
    monkeypatch.setattr(watching.logger, "warning", heard.append)
    distances = {0: 0.0, 8: 1.0, 15: 1.0}
    monkeypatch.setattr(watching, "_distance", lambda trainer, *args: distances[trainer.state.global_step])
    monkeypatch.setattr(watching, "_label_loss", lambda *args: next(losses))
    pruned_trainer(tmp_path, config={"distillation": 0.5}).train()
    assert len(heard) == 1 and ("had fallen from 1.13" in heard[0]) == told


def test_an_evaluation_set_may_lack_labels(tmp_path, monkeypatch):
    heard, values = [], chain([0.0], repeat(1.0))
    monkeypatch.setattr(watching.logger, "warning", heard.append)
    monkeypatch.setattr(watching, "_distance", lambda *args: next(values))
    trainer = pruned_trainer(tmp_path, config={"distillation": 0.5, "recovery_check": "eval"})
    trainer.eval_dataset = Rows(8, labels=False)
    trainer.train()
    assert same(trainer.before, trainer.model.state_dict())
    assert len(heard) == 1 and "is undone" in heard[0] and "loss of the labels" not in heard[0]


def test_what_harmed_the_labels_says_nothing_of_them(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(watching.logger, "warning", heard.append)
    pruned_trainer(tmp_path, HARMS, config={"distillation": 0.5}).train()
    assert len(heard) == 1 and "is undone" in heard[0] and "loss of the labels" not in heard[0]


def test_the_best_weights_may_be_of_an_attempt_with_larger_batches(tmp_path, monkeypatch):
    heard, values = [], chain([2.0, 1.0], repeat(3.0))
    monkeypatch.setattr(watching.logger, "warning", heard.append)
    monkeypatch.setattr(watching, "_distance", lambda *args: next(values))
    trainer = pruned_trainer(tmp_path, auto_find_batch_size=True)
    step = trainer.training_step

    def too_large_later(model, inputs, *args):
        if len(inputs["labels"]) > 2 and trainer.state.global_step == 10:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *args)

    trainer.training_step = too_large_later
    trainer.results["metrics"]["recovered"] = {"accuracy": 0.5}
    trainer.train()
    first = pruned_trainer(tmp_path / "first", notes=Notes(stop=10))
    with pytest.raises(Interrupted):
        first.train()
    assert same(first.notes.after[8], trainer.model.state_dict()) and not heard
    assert trainer.results["recovery"] == {"before": 2.0, "after": 1.0, "step": None}
    assert "recovered" not in trainer.results["metrics"]
    assert "those of an attempt with larger batches" in recovery_in_words(trainer.results)
