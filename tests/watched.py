"""Trainers of a pruned model whose recovery is watched."""

import copy

import torch
from tiny import make_model
from trainers import Rows, make_trainer
from transformers import TrainerCallback

from hap_transformers import HapConfig


ROWS = Rows(60)
HELD_OUT = 3  # A twentieth.
CONFIG = {"ratio": 0.5, "budget": "heads", "method": "magnitude", "refit": False, "distillation": 1.0}
HARMS, HELPS = 1.0, 1e-3


class Interrupted(Exception):
    pass


class Notes(TrainerCallback):
    """Notes the weights after every step and at the end, and interrupts a training at a step."""

    def __init__(self, stop=0):
        self.stop, self.after, self.ended = stop, {}, None

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = copy.deepcopy(model.state_dict())
        if state.global_step == self.stop:
            raise Interrupted

    def on_train_end(self, args, state, control, model, **kwargs):
        self.ended = copy.deepcopy(model.state_dict())


def pruned_trainer(folder, learning_rate=HELPS, notes=None, config=(), **arguments):
    """A trainer of a pruned model; its `before` are the weights that pruning left, its `notes` of the recovery."""
    hap_config = HapConfig(**{**CONFIG, "recovery_learning_rate": learning_rate, **dict(config)})
    model = make_model(dtype=torch.float32)
    trainer = make_trainer(folder, model=model, hap_config=hap_config, watched=True, **{"rows": ROWS, **arguments})
    trainer.prune()
    with torch.no_grad():  # There shall be something to recover.
        trainer.model.classifier.weight.add_(0.5)
        trainer.model.classifier.weight[0].sub_(1.0)
    trainer.before = copy.deepcopy(trainer.model.state_dict())
    trainer.notes = notes or Notes()
    trainer.add_callback(trainer.notes)
    return trainer


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())
