"""A recovery is watched on examples that it does not see, and never ends worse than it began."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tiny import make_model
from torch.nn import functional as F
from torch.utils.data import Subset
from trainers import Rows, make_trainer
from transformers import ResNetConfig, ResNetForImageClassification, default_data_collator
from watched import HARMS, HELD_OUT, ROWS, Interrupted, Notes, pruned_trainer, same

from hap_transformers import HapConfig, HapTrainer
from hap_transformers.training import best_state, watching
from hap_transformers.training.best_state import BEST_STATE
from hap_transformers.training.held_out import set_aside
from hap_transformers.training.hooks import TrainerHooks


def divergence(trainer, weights, rows):
    """That of the dense model's predictions from a model's with some weights."""
    model = copy.deepcopy(trainer.model).eval()
    model.load_state_dict(weights)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        p, q = (one(**batch).logits.double().softmax(-1) for one in (trainer.teacher.eval(), model))
    return (p * (p / q).log()).sum(-1).mean().item()


def told(trainer, name="hap_distance"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_recovery_that_harms_is_undone(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(watching.logger, "warning", heard.append)
    trainer = pruned_trainer(tmp_path, HARMS)
    trainer.train()
    assert same(trainer.before, trainer.model.state_dict())
    assert not same(trainer.before, trainer.notes.after[15]) and same(trainer.before, trainer.notes.ended)
    assert trainer.results["recovery"]["step"] == 0 and min(told(trainer)) == told(trainer)[0]
    assert sum("The recovery did not help and is undone" in words for words in heard) == 1


@pytest.mark.parametrize("evaluated", [Rows(8), {"one": Rows(8), "other": Rows(4)}])
def test_a_metric_that_there_is_not_is_named(tmp_path, evaluated):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "f1", "greater_is_better": True}
    every = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    trainer = pruned_trainer(tmp_path, **best, **every)
    trainer.eval_dataset = evaluated
    with pytest.raises(KeyError, match="metric_for_best_model='f1' is not among the metrics.*accuracy"):
        trainer.train()


def test_a_recovery_that_begins_anew_begins_from_the_pruned_model(tmp_path):
    trainer = pruned_trainer(tmp_path, HARMS, auto_find_batch_size=True)
    step, told_to = trainer.training_step, []

    def too_large_later(model, inputs, *args):
        if len(inputs["labels"]) > 2 and len(told_to) == 3:
            raise RuntimeError("CUDA out of memory.")
        told_to.append(copy.deepcopy(trainer.model.state_dict()))
        return step(model, inputs, *args)

    trainer.training_step = too_large_later
    trainer.train()
    assert not same(trainer.before, told_to[2]) and same(trainer.before, told_to[3])
    undisturbed = pruned_trainer(tmp_path / "undisturbed", HARMS)
    undisturbed.train()
    assert trainer.results["recovery"]["before"] == pytest.approx(undisturbed.results["recovery"]["before"])


@pytest.mark.parametrize(
    ("config", "rows", "words"),
    [
        ({}, ROWS, "by the distance to the dense model on examples that were held out"),
        ({"distillation": 0.0}, ROWS, "by the loss of the labels on examples that were held out"),
        ({}, Rows(12), "by the distance to the dense model on training examples"),
        ({"recovery_check": "eval"}, ROWS, "by the distance to the dense model on the evaluation set"),
    ],
)
def test_the_warning_says_what_was_measured(tmp_path, monkeypatch, config, rows, words):
    heard = []
    monkeypatch.setattr(watching.logger, "warning", heard.append)
    trainer = pruned_trainer(tmp_path, config=config)
    trainer.train_dataset = rows
    monkeypatch.setattr(watching, "_distance", lambda trainer, *args: trainer.state.global_step)
    trainer.train()
    assert any(words in warning for warning in heard)


class Endless(torch.utils.data.IterableDataset):
    """Rows without an end, which are counted."""

    count = 0

    def __iter__(self):
        while True:
            for row in ROWS:
                self.count += 1
                yield row


def test_no_more_of_a_stream_is_read_than_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "MOST", 20)
    trainer = pruned_trainer(tmp_path, max_steps=4)
    trainer.train_dataset = rows = Endless()
    trainer.train()
    assert trainer.state.global_step == 4 and rows.count <= 20 + 4 * 4 + 4  # A batch may be fetched ahead.


def test_no_more_of_a_loader_of_ones_own_is_read_than_needed(tmp_path, monkeypatch):
    measured = []

    class Own(HapTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(ROWS, batch_size=4, collate_fn=default_data_collator)

        def compute_loss(self, model, inputs, *args, **kwargs):
            if not model.training:
                measured.append(len(inputs["input_ids"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(watching, "MOST", 20)
    trainer = pruned_trainer(tmp_path, trainer_class=Own, config={"distillation": 0.0})
    measured.clear()
    trainer.train()
    assert measured == [4] * 5 * len(told(trainer, "hap_label_loss"))


def test_weights_that_are_no_numbers_are_undone(tmp_path):
    trainer = pruned_trainer(tmp_path)
    trainer.create_optimizer()
    compute_loss, steps = trainer.compute_loss, iter(range(99))

    def spoiled(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if model.training and next(steps) == 4 else loss

    trainer.compute_loss = spoiled
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_distance_is_the_divergence_on_rows_that_are_held_out(tmp_path):
    trainer = pruned_trainer(tmp_path, 1e-4, num_train_epochs=4)  # So slow that there are digits to compare.
    trainer.train()
    _, held_out = set_aside(ROWS, trainer.args.seed)
    rows = [held_out[place] for place in range(len(held_out))]
    assert len(rows) == HELD_OUT
    found, after = told(trainer), {0: trainer.before, **trainer.notes.after}
    measured = [0, 15, 30, 45, 60]  # Four times 15 steps take 33 times the passes of measuring once.
    assert [entry["step"] for entry in trainer.state.log_history if "hap_distance" in entry] == measured
    for step, value in zip(measured, found, strict=True):
        assert divergence(trainer, after[step], rows) == pytest.approx(value, rel=1e-4)
    recovery = trainer.results["recovery"]
    assert recovery == {"before": found[0], "after": min(found), "step": measured[found.index(min(found))]}
    assert min(found) < found[0] and same(after[recovery["step"]], trainer.model.state_dict())


def test_neither_refit_nor_recovery_see_them(tmp_path):
    seen = []

    class Noting(HapTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.extend(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = pruned_trainer(tmp_path, trainer_class=Noting, config={"refit": True, "refit_examples": 99})
    refitted = [ids for batch in trainer._refit_batches(99) for ids in batch["input_ids"].tolist()]
    trainer.train()
    rest, held_out = set_aside(ROWS, trainer.args.seed)
    hidden = [held_out[place]["input_ids"].tolist() for place in range(HELD_OUT)]
    assert len(seen) == len(refitted) == len(rest) == 57
    assert not any(ids in seen or ids in refitted for ids in hidden)
    assert trainer.train_dataset is ROWS


def test_the_best_weights_are_those_of_the_lowest_value(tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(watching, "_distance", lambda *args: next(values))
    trainer = pruned_trainer(tmp_path)
    trainer.train()
    assert trainer.results["recovery"] == {"before": 3.0, "after": 1.0, "step": 8}
    assert same(trainer.notes.after[8], trainer.model.state_dict())
    assert same(trainer.notes.after[8], trainer.notes.ended)  # What other callbacks save or share.


def test_a_divergence_that_is_rounded_below_zero_is_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainerHooks, "distance_to_dense", lambda *args: torch.tensor(-1e-9))
    trainer = pruned_trainer(tmp_path)
    trainer.train()
    assert set(told(trainer)) == {0.0} and trainer.results["recovery"] == {"before": 0.0, "after": 0.0, "step": 0}


@pytest.mark.parametrize("best_step", [0, 8])
def test_a_resumed_recovery_keeps_the_best_weights(tmp_path, monkeypatch, best_step):
    """They are from before the interruption."""
    values = {0: 2.0, 8: 3.0, 15: 4.0, best_step: 1.0}
    monkeypatch.setattr(watching, "_distance", lambda trainer, *args: values[trainer.state.global_step])
    saving = {"save_strategy": "steps", "save_steps": 5}
    cut = pruned_trainer(tmp_path, notes=Notes(stop=12), **saving)
    with pytest.raises(Interrupted):
        cut.train()
    best = cut.notes.after.get(best_step, cut.before)
    again = pruned_trainer(tmp_path, **saving)
    again.train(resume_from_checkpoint=True)
    assert sorted(again.notes.after) == [11, 12, 13, 14, 15]
    assert again.results["recovery"] == {"before": values[0], "after": 1.0, "step": best_step}
    assert same(best, again.model.state_dict())


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"rubbish")])
def test_a_resumption_without_them_says_so(tmp_path, monkeypatch, spoil):
    heard = []
    monkeypatch.setattr(best_state.logger, "warning", heard.append)
    saving = {"save_strategy": "steps", "save_steps": 5}
    with pytest.raises(Interrupted):
        pruned_trainer(tmp_path, notes=Notes(stop=7), **saving).train()
    spoil(tmp_path / "_recovery" / BEST_STATE)
    again = pruned_trainer(tmp_path, **saving)
    again.train(resume_from_checkpoint=True)
    assert len(heard) == 1 and "cannot return to weights from before it" in heard[0]
    assert again.results["recovery"]["step"] >= 5


def test_a_resumption_without_them_keeps_the_best_checkpoint(tmp_path):
    """Its metric is not that of the checkpoint that the recovery goes on from."""
    saving = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    wanted = {**saving, "load_best_model_at_end": True, "metric_for_best_model": "told", "greater_is_better": True}

    def metric(values):
        told = iter(values)
        return lambda prediction: {"told": next(told)}

    cut = pruned_trainer(tmp_path, notes=Notes(stop=12), **wanted)
    cut.compute_metrics = metric([0.0, 3.0, 2.0])
    with pytest.raises(Interrupted):
        cut.train()
    (tmp_path / "_recovery" / BEST_STATE).unlink()
    again = pruned_trainer(tmp_path, **wanted)
    again.compute_metrics = metric([1.0])
    again.train(resume_from_checkpoint=True)
    assert again.state.best_global_step == 5 and same(cut.notes.after[5], again.model.state_dict())


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("dense_is_best", [True, False])
def test_the_best_model_of_the_training_arguments(tmp_path, greater, dense_is_best):
    """Their metric decides between their best checkpoint and the weights from before."""
    told = iter([3.0 if dense_is_best else 0.0, 1.0, 2.0, 1.0])
    trainer = pruned_trainer(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="told",
        greater_is_better=greater,
        **{"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5},
    )
    trainer.compute_metrics = lambda prediction: {"told": next(told) * (1 if greater else -1)}
    trainer.train()
    best = trainer.before if dense_is_best else trainer.notes.after[10]
    assert same(best, trainer.model.state_dict()) and same(best, trainer.notes.ended)
    assert trainer.results["recovery"]["step"] == (0 if dense_is_best else 15)
    assert abs(trainer.results["metrics"]["pruned"]["told"]) == (3.0 if dense_is_best else 0.0)


def test_judged_by_the_evaluation_set_or_not_at_all(tmp_path):
    trainer = pruned_trainer(tmp_path, config={"recovery_check": "eval"})
    trainer.train()
    assert told(trainer)[0] == pytest.approx(divergence(trainer, trainer.before, Rows(8).rows), rel=1e-4)
    trainer = pruned_trainer(tmp_path, HARMS, config={"recovery_check": "none"})
    trainer.train()
    assert same(trainer.notes.after[15], trainer.model.state_dict()) and not told(trainer)
    with pytest.raises(ValueError, match="choose from 'held_out', 'eval', 'none'"):
        HapConfig(recovery_check="validation")
    several = {"a": ROWS, "b": ROWS}
    for given, words in (
        (None, "has no eval_dataset"),
        (several, "has 2 evaluation sets"),
        (DatasetDict({name: Dataset.from_list([{"labels": 0}]) for name in several}), "has 2 evaluation sets"),
    ):
        with pytest.raises(ValueError, match=f"recovery_check='eval'.*{words}"):
            HapTrainer(make_model(), eval_dataset=given, hap_config=HapConfig(recovery_check="eval"))


def test_without_a_dense_model_the_loss_of_the_labels_judges(tmp_path):
    trainer = pruned_trainer(tmp_path, config={"distillation": 0.0})
    assert trainer.teacher is None
    trainer.train()
    _, held_out = set_aside(ROWS, trainer.args.seed)
    batch = {name: torch.stack([row[name] for row in held_out]) for name in held_out[0]}
    trainer.model.load_state_dict(trainer.before)
    logits = trainer.model.eval()(**{n: v for n, v in batch.items() if n != "labels"}).logits
    assert not told(trainer)
    loss = F.cross_entropy(logits, batch["labels"]).item()
    assert told(trainer, "hap_label_loss")[0] == pytest.approx(loss, rel=1e-5)


def test_a_sampler_of_ones_own_draws_from_all_rows(tmp_path):
    class Own(HapTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(range(60))

    trainer = pruned_trainer(tmp_path, trainer_class=Own)
    trainer.train()
    assert trainer.state.global_step == 15 and trainer.results["recovery"]["after"] <= told(trainer)[0]


def test_a_twentieth_at_most_512(tmp_path):
    for size, count in ((19, None), (20, 1), (60, 3), (10240, 512), (90000, 512)):
        rest, held_out = set_aside(range(size), seed=4)
        if count is None:
            assert held_out is None and rest == range(size)
            continue
        assert (len(rest), len(held_out)) == (size - count, count) and type(rest) is type(held_out) is Subset
        assert sorted([*rest, *held_out]) == list(range(size))
        assert list(set_aside(range(size), seed=4)[1]) == list(held_out) != list(set_aside(range(size), seed=5)[1])
    rest, held_out = set_aside({"a": range(40), "b": range(60)}, seed=0)
    assert {name: len(part) for name, part in held_out.items()} == {"a": 2, "b": 3} and len(rest["b"]) == 57
    assert set_aside({"a": range(40), "b": range(9)}, seed=0)[1] is None
    stream = IterableDataset.from_generator(lambda: iter([{"a": 1}] * 99))
    assert set_aside(stream, seed=0) == (stream, None)


class Masking:
    """A collator that draws at random which rows it leaves out, as one that masks tokens does."""

    def __init__(self, draw):
        self.draw = draw

    def __call__(self, rows):
        batch = default_data_collator(rows)
        batch["input_ids"] = torch.where(self.draw(batch["input_ids"].shape) < 0.5, 3, batch["input_ids"])
        return batch


@pytest.mark.parametrize("draw", [torch.rand, lambda shape: torch.from_numpy(np.random.rand(*shape))])
def test_all_weights_are_measured_on_the_same_draw(tmp_path, draw):
    measured = []
    for place in range(2):
        trainer = pruned_trainer(tmp_path / str(place), learning_rate=1e-30)
        trainer.data_collator = Masking(draw)
        torch.manual_seed(place)  # A later process, which resumes a run, draws other numbers.
        np.random.seed(place)
        trainer.train()
        measured += told(trainer)
    assert len(measured) > 4 and len(set(measured)) == 1


def test_layouts_of_weights_that_files_do_not_have(tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    model = ResNetForImageClassification(config).to(memory_format=torch.channels_last)
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(24)]
    hap_config = HapConfig(ratio=0.4, max_examples=8, refit_examples=8, tuning_epochs=0, recovery_learning_rate=HARMS)
    arguments = {"hap_config": hap_config, "watched": True, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, model=model, rows=rows, **arguments)
    trainer.prune()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer.train()
    assert trainer.results["recovery"]["step"] == 0 and (tmp_path / "_recovery" / BEST_STATE).exists()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0.0, atol=0.0)
        assert parameter.stride() == before[name].stride()
    assert not all(parameter.is_contiguous() for parameter in model.parameters())
