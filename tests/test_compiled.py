"""A compiled model is scored, planned, pruned and refitted as the eager one inside, and compiles again afterwards."""

import copy

import pytest
import torch
from tiny import make_batches, make_model
from trainers import make_trainer
from zoo import ZOO

from hap_transformers import (
    HapConfig,
    HapTrainer,
    PruningPlan,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    reconstruct,
)
from hap_transformers.efficiency import count_flops


BATCHES = make_batches(ZOO["bert"], 2)
LABELLED = [{**batch, "labels": torch.arange(8) % 2} for batch in BATCHES]
PLAN = {"heads": {0: [1]}, "neurons": {0: range(8)}}


class Counting:
    """A backend that counts the graphs it gets, and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def wrapped(model, backend):
    return torch.compile(model, backend=backend)


def forward_replaced(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def layers_in_place(model, backend):
    for layer in model.bert.encoder.layer:
        layer.compile(backend=backend)
    return model


@pytest.fixture(params=[in_place, wrapped, forward_replaced, layers_in_place], ids=lambda form: form.__name__)
def form(request):
    torch.compiler.reset()
    yield request.param
    torch.compiler.reset()


def of_one_layer(dtype=torch.float64):
    """A model that compiles fast."""
    return make_model(dtype=dtype, num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def scored_and_pruned(model, dense):
    """What methods find of a model, and the plan by which it was pruned and refitted."""
    scores = [
        estimate_sensitivity(model, LABELLED, method, progress=False)
        for method in ("gradient", "gauss_newton_trace", "kronecker")
    ]
    plan = plan_pruning(scores[-1], model, budget="flops", ratio=0.4, inputs=BATCHES[0])
    apply_plan(model, plan)
    reconstruct(model, dense, BATCHES, progress=False)
    return [found.scores for found in scores], plan


def test_the_whole_road(form):
    """Scores, plans, surgery and refit of the eager model, and outputs of the eager pruned one, compiled again."""
    eager, backend = of_one_layer(), Counting()
    compiled = form(of_one_layer(), backend)
    torch.testing.assert_close(compiled(**BATCHES[0]).logits, eager(**BATCHES[0]).logits)
    graphs = backend.graphs
    assert graphs
    (scores, plan), (expected, of_eager) = (scored_and_pruned(m, of_one_layer()) for m in (compiled, eager))
    assert_equal(scores, expected)
    assert plan == of_eager and plan.count("neurons")
    assert backend.graphs == graphs  # All this was done by the eager model.
    weights = {name.replace("_orig_mod.", ""): p for name, p in compiled.named_parameters()}
    assert_equal(weights, dict(eager.named_parameters()))
    found = compiled(**BATCHES[0]).logits
    torch.testing.assert_close(found, eager(**BATCHES[0]).logits, rtol=1e-9, atol=1e-12)
    assert backend.graphs > graphs


def test_refit_where_the_dense_model_is_the_compiled_one(form):
    dense = of_one_layer()
    smaller, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    for model in (smaller, expected):
        apply_plan(model, PruningPlan.for_model(model, **PLAN))
    reconstruct(expected, copy.deepcopy(dense), BATCHES, progress=False)
    compiled = form(dense, Counting())
    with torch.no_grad():
        compiled(**BATCHES[0])
    reconstruct(smaller, compiled, BATCHES, progress=False)
    assert_equal(dict(smaller.named_parameters()), dict(expected.named_parameters()))


def test_other_functions_take_compiled_models(form):
    eager, compiled = of_one_layer(), form(of_one_layer(), Counting())
    plan = PruningPlan.for_model(compiled, **PLAN)
    assert plan == PruningPlan.for_model(eager, **PLAN)
    assert plan.count_parameters(compiled) == plan.count_parameters(eager)
    assert count_flops(compiled, BATCHES[0]) == count_flops(eager, BATCHES[0])
    compiled.prune_heads({0: [1]})
    eager.prune_heads({0: [1]})
    assert count_flops(compiled, BATCHES[0]) == count_flops(eager, BATCHES[0])


def test_pruned_and_saved(form, tmp_path):
    compiled = form(of_one_layer(torch.float32), Counting())
    inside = getattr(compiled, "_orig_mod", compiled)
    apply_plan(compiled, PruningPlan.for_model(inside, heads={0: [1]}, neurons={0: range(24)}))
    compiled.save_pretrained(tmp_path)
    loaded = type(inside).from_pretrained(tmp_path)
    found = dict(loaded.named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in inside.named_parameters())


def test_a_copy_made_after_compiling_is_the_dense_model(form):
    """A copy of a model whose forward was replaced has the forward of the original, which is pruned later."""
    compiled, expected = form(of_one_layer(), Counting()), of_one_layer()
    for model in (compiled, expected):
        dense = copy.deepcopy(model)
        plan = PruningPlan.for_model(getattr(model, "_orig_mod", model), **PLAN)
        apply_plan(model, plan)
        reconstruct(model, dense, BATCHES, progress=False)
    inside = getattr(compiled, "_orig_mod", compiled)
    assert_equal(dict(inside.named_parameters()), dict(expected.named_parameters()))


def pruned_and_recovered(folder, compile_it):
    """The plan, and the weights in the end, of a trainer that gets a model compiled or not."""
    model = of_one_layer(torch.float32)
    plain = make_trainer(folder, model=model, max_steps=2)
    data = {"train_dataset": plain.train_dataset, "eval_dataset": plain.eval_dataset}
    config = HapConfig(ratio=0.5, max_examples=8, distillation=0.5)
    trainer = HapTrainer(compile_it(model), plain.args, **data, hap_config=config)
    plan = trainer.prune()
    trainer.train()
    return plan, dict(model.named_parameters())


@pytest.fixture(scope="module")
def of_the_eager_model(tmp_path_factory):
    return pruned_and_recovered(tmp_path_factory.mktemp("eager"), lambda model: model)


@pytest.mark.reliability
@pytest.mark.parametrize("form", [in_place, forward_replaced], indirect=True, ids=lambda form: form.__name__)
def test_the_trainer_prunes_compiled_models(form, of_the_eager_model, tmp_path):
    """It distils from the dense model, too."""
    plan, weights = pruned_and_recovered(tmp_path, lambda model: form(model, Counting()))
    assert plan == of_the_eager_model[0]
    for name, parameter in of_the_eager_model[1].items():
        torch.testing.assert_close(weights[name], parameter, rtol=1e-4, atol=1e-6)


def test_the_trainer_names_the_model_inside_of_a_wrapper(tmp_path):
    with pytest.raises(TypeError, match=r"OptimizedModule.*give its _orig_mod \(BertForSequenceClassification\)"):
        pruned_and_recovered(tmp_path, lambda model: wrapped(model, Counting()))


def test_layers_that_are_wrapped_one_by_one_are_named():
    model = of_one_layer()
    model.bert.encoder.layer = torch.nn.ModuleList([torch.compile(layer) for layer in model.bert.encoder.layer])
    with pytest.raises(ValueError, match=r"module 'encoder.layer.0' is wrapped by torch.compile.*module.compile"):
        estimate_sensitivity(model, LABELLED, progress=False)


def test_a_trainer_that_compiles_does_so_again_after_pruning(tmp_path, monkeypatch):
    compiled = []

    def compile_and_note(model, *args, _compile=torch.compile, **kwargs):
        compiled.append(sum(p.numel() for p in model.parameters()))
        return _compile(model, *args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_and_note)
    settings = {"max_steps": 1, "torch_compile": True, "torch_compile_backend": "eager"}
    trainer = make_trainer(tmp_path, model=of_one_layer(torch.float32), **settings)
    trainer.train()
    trainer.prune()
    assert len(compiled) == 1
    trainer.train()
    assert len(compiled) == 2 and compiled[1] < compiled[0]
