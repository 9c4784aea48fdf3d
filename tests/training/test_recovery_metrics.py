"""Metrics that are noted for the card are those of the weights that a recovery ends with."""

import pytest
from watched import HARMS, HELPS, pruned_trainer

from hap_transformers import PruningPlan
from hap_transformers.data.metrics import quality_metrics


def card_and_model(trainer):
    """The metrics that the card reports of the recovered model, and those that it has."""
    noted = dict(trainer.results["metrics"]["recovered"])
    return noted, quality_metrics(trainer.evaluate())


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("learning_rate", [HARMS, HELPS])
def test_metrics_from_within_a_recovery_are_those_of_its_best_weights(tmp_path, learning_rate, best):
    settings = {"save_strategy": "steps", "save_steps": 5, "load_best_model_at_end": True} if best else {}
    every = {"eval_strategy": "steps", "eval_steps": 5, **settings}
    trainer = pruned_trainer(tmp_path, learning_rate * (100 if best else 1), **every)
    trainer.evaluate()
    trainer.train()
    assert (trainer.results["recovery"]["step"] == 0) == (learning_rate == HARMS)
    if "recovered" in trainer.results["metrics"]:  # There is an evaluation at the best step.
        noted, true = card_and_model(trainer)
        assert noted == pytest.approx(true, abs=1e-6)
    else:
        assert learning_rate == HELPS and trainer.results["recovery"]["step"] % 5


def test_metrics_of_a_recovery_stay_where_another_is_undone(tmp_path):
    trainer = pruned_trainer(tmp_path, HELPS)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    recovered = dict(trainer.results["metrics"]["recovered"])
    trainer.hap_config.recovery_learning_rate, trainer.optimizer = HARMS, None
    trainer.train()
    assert trainer.results["recovery"]["step"] == 0
    noted, true = card_and_model(trainer)
    assert noted == recovered == pytest.approx(true, abs=1e-6)


def test_a_second_pruning_forgets_what_a_recovery_brought(tmp_path):
    trainer = pruned_trainer(tmp_path)
    trainer.train()
    assert "recovery" in trainer.results
    trainer.prune(PruningPlan.for_model(trainer.model, heads={0: [0]}))
    assert "recovery" not in trainer.results
