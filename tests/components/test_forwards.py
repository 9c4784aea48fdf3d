"""Forwards that were replaced: compiled ones are taken off copies, others are refused where a copy is needed."""

import copy
import functools
import types

import pytest
import torch
from tiny import make_batches, make_model
from trainers import make_trainer
from zoo import ZOO

from hap_transformers import HapConfig, PruningPlan, apply_plan, estimate_sensitivity, reconstruct
from hap_transformers.components.forwards import eager_copy


BATCHES = make_batches(ZOO["bert"], 2)
LABELLED = [{**batch, "labels": torch.arange(8) % 2} for batch in BATCHES]
PLAN = {"heads": {0: [1], 1: range(4)}, "neurons": {0: range(8)}}
PARTS = ["", "bert", "bert.encoder", "bert.encoder.layer.0", "bert.encoder.layer.1.attention.self", "classifier"]


def compiled(module):
    module.forward = torch.compile(module.forward, backend="eager")


def closure(module):
    inside = module.forward

    @functools.wraps(inside)
    def timed(*args, **kwargs):
        return inside(*args, **kwargs)

    module.forward = timed


def bound(module):
    inside = type(module).forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: inside(self, *args, **kwargs), module)


@pytest.fixture(scope="module")
def refitted():
    """The weights of a pruned and refitted model without any replaced forward."""
    return dict(pruned_and_refitted(make_model(), eager_copy).named_parameters())


def pruned_and_refitted(model, copied):
    dense = copied(model)
    apply_plan(model, PruningPlan.for_model(model, **PLAN))
    reconstruct(model, dense, BATCHES, progress=False)
    return model


@pytest.mark.parametrize("copied", [eager_copy, copy.deepcopy], ids=lambda function: function.__name__)
@pytest.mark.parametrize("path", PARTS)
def test_compiled_and_bound_forwards_are_refitted_alike(path, copied, refitted):
    for replace in (compiled, bound):
        model = make_model()
        replace(model.get_submodule(path))
        pruned_and_refitted(model, copied)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, refitted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PARTS)
def test_a_copy_no_longer_runs_the_original(path):
    model = make_model()
    compiled(model.get_submodule(path))
    copied, expected = eager_copy(model), make_model()(**BATCHES[0]).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied(**BATCHES[0]).logits, expected)


@pytest.mark.parametrize("path", PARTS)
def test_a_closure_is_refused_when_the_trainer_is_made(path, tmp_path):
    model = make_model(dtype=torch.float32)
    closure(model.get_submodule(path))
    where = f"'{path}' of this BertFor" if path else "This BertFor"
    with pytest.raises(ValueError, match=f"{where}.*has a replaced forward, '.*forward'.*in a subclass"):
        make_trainer(tmp_path, model=model)
    for pair in ((model, make_model()), (make_model(), model)):
        with pytest.raises(ValueError, match="has a replaced forward"):
            reconstruct(*pair, BATCHES, progress=False)
    with pytest.raises(ValueError, match="has a replaced forward"):
        eager_copy(model)
    assert estimate_sensitivity(model, LABELLED, progress=False).heads[0].any()  # For which no copy is made.


@torch.compiler.set_stance("force_eager")  # Who replaced what does not depend on what was compiled.
@pytest.mark.parametrize("replace", [compiled, lambda model: None], ids=["compiled", "eager"])
def test_forwards_of_accelerate_are_taken(replace, tmp_path):
    """It wraps a model's forward, compiled or not, for a training in low precision."""
    model = make_model(dtype=torch.float32, num_hidden_layers=1)
    replace(model)
    config = HapConfig(ratio=0.5, max_examples=8)
    trainer = make_trainer(tmp_path, model=model, hap_config=config, max_steps=1, bf16=True, save_strategy="no")
    trainer.train()
    assert "_original_forward" in vars(model)
    trainer.prune()
    assert "forward" not in vars(trainer.teacher) and "_original_forward" not in vars(model)
    taught = trainer.teacher.eval()(**BATCHES[0]).logits
    assert not torch.allclose(taught, model.eval()(**BATCHES[0]).logits)
    assert hasattr(model.forward, "_torchdynamo_orig_callable") == (replace is compiled)


def test_a_forward_that_runs_no_layer_is_named():
    model, dense = make_model(), make_model()
    apply_plan(model, PruningPlan.for_model(model, **PLAN))
    with pytest.raises(ValueError, match="without calling its 'encoder.layer.0.attention.output.dense'"):
        reconstruct(model, dense, BATCHES, forward=lambda model, batch: None, progress=False)


@pytest.mark.parametrize("path", ["bert", "bert.encoder", "bert.encoder.layer.0", "bert.encoder.layer.1.attention"])
def test_modules_wrapped_by_compilation_are_named(path):
    model = make_model()
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.compile(model.get_submodule(path)))
    with pytest.raises(ValueError, match=rf"module '{path.removeprefix('bert.')}' is wrapped by torch.compile.*_orig"):
        estimate_sensitivity(model, LABELLED, progress=False)


def test_a_wrapped_module_beside_the_layers_does_not_matter(tmp_path):
    model = make_model(dtype=torch.float32)
    model.classifier = torch.compile(model.classifier, backend="eager")
    model.bert.embeddings = torch.compile(model.bert.embeddings, backend="eager")
    estimate_sensitivity(model, LABELLED, progress=False)
    apply_plan(model, PruningPlan.for_model(model, **PLAN))
    assert model(**BATCHES[0]).logits.isfinite().all()
