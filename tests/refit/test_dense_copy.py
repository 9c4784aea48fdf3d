"""A dense model that shares its parameters with the pruned one takes no memory, and is as good as a whole copy."""

import copy

import pytest
import torch
from tiny import make_batches, make_model
from trainers import make_trainer
from zoo import ZOO, logits

from hap_transformers import HapConfig, PruningPlan, apply_plan, reconstruct
from hap_transformers.refit.dense_copy import own_all, sharing_copy


# The second layer loses no heads: what the refit writes there is not cut before.
REMOVED = {"heads": {0: [1]}, "neurons": {0: range(8), 1: range(4)}}


def test_it_has_the_models_parameters(model_type):
    model = ZOO[model_type].model()
    shared = sharing_copy(model)
    for (name, first), (other, second) in zip(model.named_parameters(), shared.named_parameters(), strict=True):
        assert first is second and name == other
    assert not {id(module) for module in model.modules()} & {id(module) for module in shared.modules()}


@pytest.mark.parametrize("implants", [{}, {1: 2}], ids=["plain", "implants"])
def test_a_refit_with_it_is_that_with_a_whole_copy(model_type, implants):
    tiny = ZOO[model_type]
    batches, found = make_batches(tiny, 2), []
    for make_copy in (copy.deepcopy, sharing_copy):
        model = tiny.model()
        dense = make_copy(model)
        before = logits(dense, tiny)
        apply_plan(model, PruningPlan.for_model(model, **REMOVED, implants=implants))
        reconstruct(model, dense, batches, init_implants=tuple(implants), progress=False)
        assert torch.equal(logits(dense, tiny), before)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_only_what_the_refit_writes_is_copied():
    model = make_model()
    dense = sharing_copy(model)
    apply_plan(model, PruningPlan.for_model(model, neurons={0: range(8)}))
    reconstruct(model, dense, make_batches(ZOO["bert"], 1), progress=False)
    ours = {id(parameter) for parameter in model.parameters()}
    cut = {f"bert.encoder.layer.0.{name}" for name in ("intermediate.dense.weight", "intermediate.dense.bias")}
    read_by = ["attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"]
    written = {"bert.encoder.layer.0.output.dense"} | {
        f"bert.encoder.layer.1.{name}" for name in (*read_by, "attention.output.dense", "output.dense")
    }
    written = {f"{name}.{kind}" for name in written for kind in ("weight", "bias")}
    assert {name for name, p in dense.named_parameters() if id(p) not in ours} == cut | written


def test_tied_parameters_stay_tied():
    model = ZOO["gpt2"].model()
    dense = sharing_copy(model)
    own_all(dense, model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in dense.parameters()}
    assert len(list(dense.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("refit", [True, False])
def test_the_teacher_of_a_recovery_stays_as_it_was(tmp_path, refit):
    whole = ["heads", "neurons"]  # To align heads is to change their weights.
    config = HapConfig(ratio=0.5, max_examples=8, distillation=0.5, refit=refit, components=whole)
    trainer = make_trainer(tmp_path, hap_config=config, max_steps=2)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.prune()
    trainer.train()
    teacher = trainer.teacher.state_dict()
    assert teacher.keys() == before.keys() and all(torch.equal(before[name], teacher[name]) for name in before)
    assert not torch.equal(
        trainer.model.bert.embeddings.word_embeddings.weight, teacher["bert.embeddings.word_embeddings.weight"]
    )


def test_a_refit_that_fails_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, hap_config=HapConfig(ratio=0.5, max_examples=8))
    before, parameters = copy.deepcopy(trainer.model.state_dict()), list(trainer.model.parameters())

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("hap_transformers.refit.reconstruct._refit", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="while the model was refitted. Set a smaller per_device"):
        trainer.prune()
    assert all(first is second for first, second in zip(trainer.model.parameters(), parameters, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
