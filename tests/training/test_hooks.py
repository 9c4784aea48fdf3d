"""Hooks are those of the nearest registered class; a trainer of a wrapper needs no more than its page says."""

import re

import pytest
import torch
from tiny import ROOT, make_model
from torch import nn
from trainers import Rows, make_trainer
from transformers import Trainer

from hap_transformers import HapConfig, HapTrainer, HapTrainerMixin
from hap_transformers.training import hooks
from hap_transformers.training.hooks import TrainerHooks, hooks_of, register_hooks
from hap_transformers.training.language_trainers import SFTHooks


PAGE = (ROOT / "docs" / "how_to" / "any_trainer.md").read_text(encoding="utf-8")


class Wrapper(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.encoder(input_ids, attention_mask=attention_mask, labels=labels)


class WrapperTrainer(Trainer):
    pass


class Pruned(HapTrainerMixin, WrapperTrainer):
    pass


@pytest.fixture
def registered(monkeypatch):
    """The hooks of the page, for the trainer in this file."""
    monkeypatch.setattr(hooks, "HOOKS", dict(hooks.HOOKS))
    (snippet,) = (part for part in re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL) if "WrapperHooks" in part)
    exec(snippet.replace('"my_package"', f'"{__name__}"'), {"Wrapper": Wrapper})


def test_the_nearest_registered_class(monkeypatch):
    monkeypatch.setattr(hooks, "HOOKS", dict(hooks.HOOKS))
    assert type(hooks_of(HapTrainer.__new__(HapTrainer))) is TrainerHooks
    theirs = type("SFTTrainer", (Trainer,), {"__module__": "trl.trainer"})
    below = type("Below", (HapTrainerMixin, type("Theirs", (theirs,), {})), {})
    assert type(hooks_of(below.__new__(below))) is SFTHooks
    own = type("Own", (SFTHooks,), {})
    register_hooks(__name__, "Theirs", own)
    assert type(hooks_of(below.__new__(below))) is own


@pytest.mark.parametrize("labels", [True, False])
def test_a_wrapper_is_pruned_and_recovered(tmp_path, registered, labels):
    wrapper = Wrapper(make_model(dtype=torch.float32))
    config = HapConfig(ratio=0.5, max_examples=12, distillation=0.5 if labels else 1.0)
    rows = Rows(labels=labels)
    trainer = make_trainer(tmp_path, Pruned, model=wrapper, rows=rows, hap_config=config, max_steps=2)
    if labels:
        trainer.train()
    dense = sum(parameter.numel() for parameter in wrapper.parameters())
    plan = trainer.prune()
    assert trainer.model is wrapper and plan.promise["parameters"] < dense
    assert isinstance(trainer.teacher, Wrapper) and trainer.teacher.encoder is not wrapper.encoder
    assert sum(parameter.numel() for parameter in trainer.teacher.parameters()) == dense
    before = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    trainer.train()
    assert trainer._has_distilled
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.teacher.state_dict().items())
    wrapper.encoder.save_pretrained(tmp_path / "pruned")
    reloaded = type(wrapper.encoder).from_pretrained(tmp_path / "pruned")
    assert reloaded.num_parameters() == wrapper.encoder.num_parameters()
