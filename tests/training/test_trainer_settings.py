"""Settings with which `Trainer` makes, places or feeds the model differently."""

import copy
import dataclasses

import pytest
import torch
from tiny import make_model
from trainers import make_trainer

from hap_transformers import HapConfig, HapTrainer, LatencyTable


def test_a_model_made_by_the_trainer_stays_pruned(tmp_path):
    """`Trainer` makes a new model at every train(); after prune() it must not."""

    def trainer_class(model, **given):
        return HapTrainer(model_init=lambda: make_model(dtype=torch.float32), **given)

    trainer = make_trainer(tmp_path, trainer_class)
    trainer.train()
    trainer.prune()
    pruned = trainer.model
    trainer.train()
    assert trainer.model is pruned and trainer.model.config.pruned_heads


def test_scores_in_the_batch_size_that_training_found(tmp_path):
    trainer = make_trainer(tmp_path, auto_find_batch_size=True)
    step, sizes = trainer.training_step, []

    def too_large(model, inputs, *args):
        if len(inputs["labels"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return step(model, inputs, *args)

    trainer.training_step = too_large
    trainer.train()
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs: sizes.append(len(inputs["labels"])) or compute_loss(model, inputs)
    trainer.prune()
    assert max(sizes) == 2


def test_a_model_that_trainer_has_not_placed_yet_is_placed_to_be_scored(tmp_path, monkeypatch):
    """`bf16_full_eval` and FSDP do this. Here the test pretends that the model is on another device."""
    trainer, placed = make_trainer(tmp_path), []
    elsewhere = property(lambda self: torch.device("cpu" if placed else "meta"))
    monkeypatch.setattr(type(trainer.model), "device", elsewhere)
    monkeypatch.setattr(trainer, "_move_model_to_device", lambda model, device: placed.append((model, device)))
    trainer.prune()
    assert placed == [(trainer.model, trainer.args.device)]


def test_a_text_longer_than_the_model_takes_is_refused_at_once(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="BertForSequenceClassification takes at most 32 tokens, not 512"):
        HapTrainer(make_model(), trainer.args, hap_config=HapConfig(sequence_length=512))


def test_latency_in_the_mode_and_precision_of_the_run(tmp_path, monkeypatch):
    measure, asked = LatencyTable.measure, []

    def noted(*args, **given):
        asked.append(given)
        return measure(*args, **given, points=2, repeats=1)

    monkeypatch.setattr(LatencyTable, "measure", noted)
    config = HapConfig(budget="latency", ratio=0.3, method="magnitude", min_heads=0, min_neurons=0.0)
    trainer = make_trainer(tmp_path, bf16=True, hap_config=config)
    trainer.plan(trainer.estimate_sensitivity())
    assert (trainer.latency_table.mode, trainer.latency_table.precision) == ("eager", "bf16")
    assert asked[0]["mode"] == "eager" and asked[0]["precision"] == "bf16"


def test_latency_that_cannot_be_measured_is_refused_at_once(tmp_path):
    config = HapConfig(budget="latency", latency_mode="cuda_graphs", components=["heads", "neurons"])
    with pytest.raises(ValueError, match="'cuda_graphs' needs a CUDA device, and the model runs on 'cpu'"):
        make_trainer(tmp_path, hap_config=config)
    counts, seconds = {"heads": [0, 4], "neurons": [0, 24]}, {"heads": [0.0, 1.0], "neurons": [0.0, 1.0]}
    table = LatencyTable("bert", counts, seconds, 1.0, {})

    def with_table(**given):
        return HapTrainer(**given, latency_table=table)

    with pytest.raises(ValueError, match="measured in mode 'eager', but latency_mode is 'cuda_graphs'"):
        make_trainer(tmp_path, with_table, hap_config=config)
    table.mode = "cuda_graphs"  # Measured elsewhere.
    assert make_trainer(tmp_path, with_table, hap_config=config).latency_table is table
    with pytest.raises(ValueError, match="does not know heads with fewer than 4 dimensions. Measure it again"):
        make_trainer(tmp_path, with_table, hap_config=dataclasses.replace(config, components=None))


def test_the_dense_model_runs_in_the_precision_of_the_training(tmp_path):
    """In float32 it would take most of a step's time, and a model would have a distance to itself."""
    trainer = make_trainer(tmp_path, bf16=True, watched=True, hap_config=HapConfig(ratio=0.5, budget="heads"))
    trainer.prune()
    trainer.teacher = copy.deepcopy(trainer.model)
    trainer.train()
    first, *others = [entry["hap_distance"] for entry in trainer.state.log_history if "hap_distance" in entry]
    assert first == 0 and others and all(others)
