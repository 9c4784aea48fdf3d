"""Trainings that end early, models pruned behind a running training, and adapters that cannot learn."""

import peft
import pytest
import torch
from trainers import Rows, make_trainer
from transformers import TrainerCallback
from zoo import ZOO

from hap_transformers import HapConfig, HapTrainer, PruningPlan, apply_plan, emptied_modules, prune_heads


CONFIG = HapConfig(ratio=0.5, budget="heads", max_examples=8)


class At(TrainerCallback):
    """Does something to the model at the end of the first step."""

    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 1:
            self.act(model)


def failing(error):
    def fail(model):
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no"), torch.OutOfMemoryError()], ids=repr)
def test_prune_after_a_training_that_ended_early(error, tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[At(failing(error))], hap_config=CONFIG, max_steps=3)
    with pytest.raises(type(error)):
        trainer.train()
    assert trainer.prune().count("heads") == 4
    trainer.pop_callback(At)
    trainer.train()


def by_plan(model):
    apply_plan(model, PruningPlan.for_model(model, neurons={0: range(8)}))


@pytest.mark.parametrize("act", [by_plan, lambda model: prune_heads(model, {0: [1]})], ids=["apply_plan", "heads"])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_model_pruned_behind_a_training_is_told(act, pruned, tmp_path):
    callback = At(act)
    trainer = make_trainer(tmp_path, hap_config=CONFIG, max_steps=3)
    if pruned:
        trainer.prune(PruningPlan.for_model(trainer.model, heads={1: [0]}))
        trainer.train()
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match=r"pruned while train\(\) runs, whose optimizer holds.*alternate"):
        trainer.train()
    assert trainer.state.global_step == 1
    trainer.remove_callback(callback)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()  # A new training has an optimizer of what is left.
    assert trainer.state.global_step == 3


def test_an_optimizer_made_after_pruning_is_taken(tmp_path):
    def act(model):
        by_plan(model)
        trainer.optimizer = None
        trainer.create_optimizer()

    trainer = make_trainer(tmp_path, callbacks=[At(act)], hap_config=CONFIG, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_optimizer_of_ones_own_is_taken_after_pruning(tmp_path):
    class Own(HapTrainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    trainer = make_trainer(tmp_path, Own, hap_config=CONFIG, max_steps=1)
    trainer.train()
    trainer.prune()
    trainer.train()


@pytest.mark.parametrize("leave_out", [False, True])
def test_dora_on_an_emptied_block_is_warned_about(leave_out, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr("hap_transformers.training.recovery.logger.warning", heard.append)
    model = ZOO["bert"].model(torch.float32)
    apply_plan(model, PruningPlan.for_model(model, neurons={0: range(24)}))
    excluded = {"exclude_modules": emptied_modules(model)} if leave_out else {}
    lora = peft.LoraConfig(use_dora=True, target_modules=["dense"], task_type="SEQ_CLS", **excluded)
    adapted = peft.get_peft_model(model, lora)
    make_trainer(tmp_path, model=adapted, rows=Rows(8), hap_config=None, max_steps=1).train()
    told = [warning for warning in heard if "DoRA is on" in warning and "exclude_modules" in warning]
    assert len(told) == (0 if leave_out else 1)
    if not leave_out:
        assert "encoder.layer.0.intermediate.dense'" in told[0]
