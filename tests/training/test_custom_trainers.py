"""What works, or is refused by name, besides `Trainer`'s defaults: callbacks, searches, loaders, metrics, outputs."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from tiny import WHOLE_HEADS, make_model, untouched
from torch.utils.data import DataLoader
from trainers import Rows, make_trainer
from transformers import BertForSequenceClassification, TrainerCallback
from zoo import ZOO

from hap_transformers import HapConfig, HapTrainer, estimate_sensitivity


def bert(task="ForSequenceClassification", **config):
    return dataclasses.replace(ZOO["bert"], task=task).model(torch.float32, **config)


def projection_of(model):
    return model.bert.encoder.layer[0].attention.self.query


def test_prune_while_training_is_refused_and_changes_nothing(tmp_path):
    states = []

    class Gradually(TrainerCallback):
        def on_epoch_end(self, *args, **kwargs):
            before = copy.deepcopy(trainer.model.state_dict())
            parameters = list(trainer.model.parameters())
            with pytest.raises(ValueError, match=r"prune\(\) was called while train\(\) runs.*alternate: trainer"):
                trainer.prune()
            assert all(p is q for p, q in zip(parameters, trainer.model.parameters(), strict=True))
            states.append(untouched(trainer.model, before) and trainer.pruning_plan is None)

    settings = {"rows": Rows(8), "num_train_epochs": 2}
    trainer = make_trainer(tmp_path, callbacks=[Gradually()], **settings)
    trainer.train()
    assert states == [True, True]
    other = make_trainer(tmp_path / "other", **settings)  # Training has gone on as without the attempts.
    other.train()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), other.model.parameters(), strict=True))
    trainer.prune()


def test_gradual_pruning_as_the_message_says(tmp_path):
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.25, budget="heads", max_examples=8), max_steps=1)
    left = []
    for ratio in (0.25, 0.5):
        trainer.train()
        trainer.hap_config.ratio = ratio
        trainer.prune()
        left.append(8 - sum(len(heads) for heads in trainer.model.config.pruned_heads.values()))
    trainer.train()
    assert 8 > left[0] > left[1] > 0


def searching(folder, **settings):
    """A trainer that makes its models itself."""

    def model_init(trial=None):
        return make_model(dtype=torch.float32)

    config = HapConfig(ratio=0.5, budget="heads", max_examples=8)
    arguments = {"hap_config": config, "max_steps": 1, **settings}
    plain = make_trainer(folder, **arguments)
    return HapTrainer(
        model_init=model_init,
        args=plain.args,
        train_dataset=plain.train_dataset,
        eval_dataset=plain.eval_dataset,
        hap_config=plain.hap_config,
    )


def space(trial):
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}


def test_a_search_after_pruning_says_what_became_of_model_init(tmp_path):
    trainer = searching(tmp_path)
    trainer.prune()
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=r"prune\(\) has dropped model_init.*Search before pruning"):
        trainer.hyperparameter_search(hp_space=space, backend="optuna", n_trials=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_pruning_right_after_a_search(tmp_path, monkeypatch):
    """The models of the trials are gone, which is told."""
    pytest.importorskip("optuna")
    heard = []
    monkeypatch.setattr("hap_transformers.training.pruning.logger.warning", heard.append)
    trainer = searching(tmp_path)
    best = trainer.hyperparameter_search(
        hp_space=space, backend="optuna", n_trials=2, direction="minimize", compute_objective=lambda m: m["eval_loss"]
    )
    assert 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-3
    plan = trainer.prune()
    assert sum("Set the best parameters in trainer.args and call train() before" in told for told in heard) == 1
    assert plan.count("heads") == 4
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert sum(len(heads) for heads in trainer.model.config.pruned_heads.values()) == 4


def test_a_search_with_a_model_init_that_loads_the_pruned_model(tmp_path):
    """As the error of a search after pruning says."""
    pytest.importorskip("optuna")
    first = searching(tmp_path / "first")
    first.prune()
    first.save_model(str(tmp_path / "pruned"))
    trainer = HapTrainer(
        model_init=lambda: BertForSequenceClassification.from_pretrained(tmp_path / "pruned"),
        args=first.args,
        train_dataset=first.train_dataset,
        eval_dataset=first.eval_dataset,
        hap_config=HapConfig(ratio=0.5, budget="heads", max_examples=8),
    )
    settings = {"direction": "minimize", "compute_objective": lambda metrics: metrics["eval_loss"]}
    best = trainer.hyperparameter_search(hp_space=space, backend="optuna", n_trials=1, **settings)
    assert 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-3
    trainer.train()
    assert sum(len(heads) for heads in trainer.model.config.pruned_heads.values()) == 4


# Loaders and metrics of one's own


def test_a_train_dataloader_of_ones_own_is_scored_and_refitted_through(tmp_path):
    """Its examples are tuples, in the order of the data set."""
    rows = Rows().rows
    collated = []

    def collate(part):
        collated.append(len(part))
        return {name: torch.stack([row[i] for row in part]) for i, name in enumerate(rows[0])}

    class Own(HapTrainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, 6, collate_fn=collate)

    tuples = [tuple(row.values()) for row in rows]
    config = HapConfig(ratio=0.5, max_examples=10, refit_examples=10, components=WHOLE_HEADS)
    trainer = make_trainer(tmp_path, Own, rows=tuples, hap_config=config, max_steps=1)
    model = copy.deepcopy(trainer.model)
    batches = [{name: torch.stack([row[name] for row in rows[i : i + 6]]) for name in rows[0]} for i in (0, 6)]
    expected = estimate_sensitivity(model, batches, max_examples=10, progress=False)
    assert trainer.estimate_sensitivity().num_examples == 10 and collated[:2] == [6, 6]
    torch.testing.assert_close(trainer.sensitivity.scores, expected.scores, rtol=1e-4, atol=1e-9)
    seen = trainer.calibration_batches()
    assert [len(batch["labels"]) for batch in seen] == [6, 4]
    for found, batch in zip(seen, batches, strict=True):
        assert all(torch.equal(value, batch[name][: len(value)]) for name, value in found.items())
    plan = trainer.prune()
    by_rows = make_trainer(tmp_path / "rows", model=model, hap_config=config)
    by_rows._scoring_batches = lambda count: batches  # The same batches by the default road.
    assert by_rows.prune() == plan
    for found, other in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-6)
    trainer.train()


def test_metrics_of_another_prefix_are_kept_and_the_cards_table_is_whole(tmp_path):
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.5, max_examples=8), max_steps=1)
    dense = trainer.evaluate()
    trainer.prune()
    pruned = trainer.evaluate(Rows(12), metric_key_prefix="test")
    trainer.train()
    recovered = {**trainer.evaluate(), **trainer.evaluate(Rows(12), metric_key_prefix="test")}
    kept = trainer.results["metrics"]
    assert kept == {
        "dense": {"loss": dense["eval_loss"], "accuracy": dense["eval_accuracy"]},
        "pruned": {"test_loss": pruned["test_loss"], "test_accuracy": pruned["test_accuracy"]},
        "recovered": {
            "loss": recovered["eval_loss"],
            "accuracy": recovered["eval_accuracy"],
            "test_loss": recovered["test_loss"],
            "test_accuracy": recovered["test_accuracy"],
        },
    }
    trainer.create_model_card()
    lines = ModelCard.load(tmp_path / "README.md").text.split("## Metrics")[1].split("## Costs")[0].splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    header, dashes, *phases = table
    assert sorted(header) == ["accuracy", "loss", "phase", "test_accuracy", "test_loss"]
    assert all(len(row) == len(header) for row in table) and set(dashes) == {"---"}
    read = {row[0]: {n: v for n, v in zip(header[1:], row[1:], strict=True) if v} for row in phases}
    assert read == {phase: {n: f"{v:.4f}" for n, v in metrics.items()} for phase, metrics in kept.items()}


def test_a_phase_without_metrics_of_the_first(tmp_path):
    """The first phase has another prefix than the others."""
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.5, max_examples=8))
    trainer.evaluate(metric_key_prefix="validation")
    trainer.prune()
    trainer.evaluate()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    table = [line for line in text.split("## Metrics")[1].split("## Costs")[0].splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    for name in ("validation_accuracy", "accuracy", "validation_loss", "loss"):
        assert name in [cell.strip() for cell in table[0].split("|")]
    for value in trainer.results["metrics"]["pruned"].values():
        assert f"{value:.4f}" in table[-1]


# Output forms


class Formed(BertForSequenceClassification):
    """A classifier that returns its outputs in another form."""

    form = tuple

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
        found = {"loss": outputs.loss, "logits": outputs.logits}
        found = {name: value for name, value in found.items() if value is not None}
        return tuple(found.values()) if self.form is tuple else found


def trained_pruned_and_recovered(folder, model):
    config = HapConfig(ratio=0.5, max_examples=12, distillation=0.5)
    trainer = make_trainer(folder, model=model, hap_config=config, max_steps=3)
    trainer.train()
    trainer.prune()
    trainer.train()
    assert trainer._has_distilled
    return trainer.pruning_plan, trainer.evaluate(), trainer.model.state_dict()


def without_dropout(**config):
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config)


@pytest.fixture(scope="module")
def of_model_output(tmp_path_factory):
    return trained_pruned_and_recovered(tmp_path_factory.mktemp("run"), without_dropout())


@pytest.mark.parametrize("form", ["tuple", "dict", "return_dict=False"])
def test_output_forms_train_prune_and_recover_alike(tmp_path, of_model_output, form):
    """With distillation, all forms give the weights of the `ModelOutput` form."""
    model = without_dropout(return_dict=form != "return_dict=False")
    if form != "return_dict=False":
        other = type("Formed", (Formed,), {"form": tuple if form == "tuple" else dict})(model.config)
        other.load_state_dict(model.state_dict())
        model = other
    plan, metrics, weights = trained_pruned_and_recovered(tmp_path, model)
    assert plan == of_model_output[0]
    for name in ("eval_loss", "eval_accuracy"):
        assert np.isclose(metrics[name], of_model_output[1][name], rtol=1e-6)
    for name, tensor in of_model_output[2].items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-7)
