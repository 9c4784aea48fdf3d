"""Scoring methods from outside the package, and what planning does with their flags."""

import pytest
import torch
from tiny import COMPARABLE, make_batch, make_model
from trainers import make_trainer
from zoo import ALL_HEADS, HEADS, LAYERS, NEURONS

from hap_transformers import (
    METHODS,
    HapConfig,
    Method,
    Sensitivity,
    apply_plan,
    estimate_sensitivity,
    plan_pruning,
    register_method,
)
from hap_transformers.sensitivity.task import Samples


BATCHES = [make_batch(size=4, seed=seed) for seed in range(3)]


def contribution(task, batch):
    """Mean squared activation of each example, times the squared norm of the column that reads it."""
    read, values = {}, []
    handles = [
        group.reader.module.register_forward_pre_hook(lambda module, args: read.__setitem__(module, args[0]))
        for group in task.groups
    ]
    try:
        with torch.no_grad():
            task.model(**batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    for group in task.groups:
        reader = group.reader
        columns = reader.matrix(reader.module.weight).square().sum(0)
        tokens = reader.tokens(read[reader.module], batch.size).square().mean(1) * columns
        values.append(tokens.unflatten(1, (group.num_components, -1)).sum(2))
    return Samples(torch.cat(values, 1))


def root(task, means):
    return means.sqrt()


def reader_norms(task, means):
    """The norm of the columns that read each component."""
    columns = [group.reader.matrix(group.reader.module.weight).square().sum(0) for group in task.groups]
    pairs = zip(task.groups, columns, strict=True)
    return torch.cat([squares.unflatten(0, (group.num_components, -1)).sum(1).sqrt() for group, squares in pairs])


@pytest.fixture(autouse=True)
def restored():
    """Restores the registry."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def outputs(model):
    """The tiny BERT's output projections, heads first, with their numbers of components."""
    for layer in model.bert.encoder.layer:
        yield layer.attention.output.dense, HEADS
    for layer in model.bert.encoder.layer:
        yield layer.output.dense, NEURONS


def test_a_method_with_samples():
    """Scores equal a loop over modules, examples and components."""
    register_method("contribution", Method(contribution, root))
    model = make_model()
    found = estimate_sensitivity(model, BATCHES, "contribution", progress=False)
    assert (found.method, found.num_examples, found.num_probes) == ("contribution", 12, 0)
    assert found.reliability is not None and not found.traces
    for (module, count), scores in zip(outputs(model), found.heads + found.neurons, strict=True):
        expected, read = torch.zeros(count, dtype=torch.float64), []
        handle = module.register_forward_pre_hook(lambda module, args, read=read: read.append(args[0]))
        for batch in BATCHES:
            model(**batch)
        handle.remove()
        size = module.in_features // count
        for component in range(count):
            part = slice(component * size, (component + 1) * size)
            columns = module.weight[:, part].square().sum(0)
            squares = [activations[:, :, part].square().mean(1) @ columns for activations in read]
            expected[component] = torch.cat(squares).mean().sqrt()
        torch.testing.assert_close(scores, expected)
    plan = plan_pruning(found, model, ratio=0.5)
    assert plan.method == "contribution"
    apply_plan(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.promise["parameters"]


def test_a_method_without_samples():
    register_method("reader_norms", Method(None, reader_norms))
    model = make_model()
    found = estimate_sensitivity(model, [], "reader_norms", progress=False)
    assert found.num_examples == 0 and found.reliability is None
    for (module, count), scores in zip(outputs(model), found.heads + found.neurons, strict=True):
        expected = module.weight.detach().square().sum(0).view(count, -1).sum(1).sqrt()
        torch.testing.assert_close(scores, expected)
    apply_plan(model, plan_pruning(found, model, ratio=0.5))


def test_a_registered_method_is_resumed(tmp_path):
    register_method("contribution", Method(contribution, root))
    whole = estimate_sensitivity(make_model(), BATCHES, "contribution", progress=False)

    def interrupted():
        yield from BATCHES[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_sensitivity(make_model(), interrupted(), "contribution", state_file=tmp_path / "s", progress=False)
    again = estimate_sensitivity(make_model(), BATCHES, "contribution", state_file=tmp_path / "s", progress=False)
    torch.testing.assert_close(again.scores, whole.scores, rtol=0, atol=0)


def test_the_trainer_takes_a_registered_method(tmp_path):
    with pytest.raises(ValueError, match="Unknown sensitivity method 'contribution'"):
        HapConfig(method="contribution")
    register_method("contribution", Method(contribution, root))
    trainer = make_trainer(tmp_path, hap_config=HapConfig(method="contribution", ratio=0.5, max_examples=8))
    assert trainer.prune().method == "contribution" and trainer.sensitivity.num_examples == 8


def test_names_are_taken_once_and_unknown_ones_refused():
    with pytest.raises(ValueError, match="'kronecker' already"):
        register_method("kronecker", Method(None, reader_norms))
    with pytest.raises(ValueError, match="Unknown sensitivity method 'reader_norms'; choose one of kronecker"):
        estimate_sensitivity(make_model(), [], "reader_norms", progress=False)


def test_a_method_for_one_kind_alone():
    register_method("heads_alone", Method(contribution, root, kinds=("heads",)))
    with pytest.raises(ValueError, match="heads_alone.*neurons"):
        estimate_sensitivity(make_model(), BATCHES, "heads_alone", components=["heads", "neurons"], progress=False)
    found = estimate_sensitivity(make_model(), BATCHES, "heads_alone", components=["heads"], progress=False)
    assert found.neurons is None
    assert plan_pruning(found, make_model(), budget="heads", ratio=0.5).count("heads") == HEADS


def test_facts_about_the_packages_methods():
    assert [name for name, method in METHODS.items() if method.comparable] == list(COMPARABLE)
    assert [name for name, method in METHODS.items() if method.foresees_refit] == ["kronecker"]
    assert [name for name, method in METHODS.items() if method.sample is None] == ["magnitude", "random"]
    assert [name for name, method in METHODS.items() if not method.scores_sharded] == ["hessian_trace"]


@pytest.mark.parametrize("comparable", [True, False])
@pytest.mark.parametrize("foresees_refit", [True, False])
def test_facts_travel_with_the_scores(tmp_path, comparable, foresees_refit):
    """The process that reads the file need not know the method."""
    facts = {"comparable": comparable, "foresees_refit": foresees_refit}
    register_method("reader_norms", Method(None, reader_norms, **facts))
    found = estimate_sensitivity(make_model(), [], "reader_norms", progress=False)
    found.save(tmp_path / "scores")
    del METHODS["reader_norms"]
    loaded = Sensitivity.load(tmp_path / "scores")
    for sensitivity in (found, loaded):
        assert {name: getattr(sensitivity, name) for name in facts} == facts


def by_hand(**facts):
    """The first layer matters least, and neurons far less than heads."""
    layers = (0.01, 1.0)
    heads = [layer * torch.linspace(1, 2, HEADS, dtype=torch.float64) for layer in layers]
    neurons = [1e-6 * layer * torch.linspace(1, 2, NEURONS, dtype=torch.float64) for layer in layers]
    return Sensitivity("by hand", {"heads": heads, "neurons": neurons}, **facts)


@pytest.mark.parametrize("foresees_refit", [True, False])
def test_floors_are_for_scores_that_do_not_foresee_a_refit(foresees_refit):
    """One head and 5 % of the neurons, unless another floor is asked for."""
    model = make_model()
    found = by_hand(foresees_refit=foresees_refit)
    plan = plan_pruning(found, model, ratio=0.6, neuron_multiple=1)
    left = {kind: count - len(plan.removed[kind][0]) for kind, count in (("heads", HEADS), ("neurons", NEURONS))}
    assert left == ({"heads": 0, "neurons": 0} if foresees_refit else {"heads": 1, "neurons": 2})
    plan = plan_pruning(found, model, ratio=0.5, neuron_multiple=1, min_heads=2, min_neurons=0.25)
    assert HEADS - len(plan.heads[0]) == 2 and NEURONS - len(plan.neurons[0]) == 6


@pytest.mark.parametrize("comparable", [True, False])
def test_one_ranking_is_for_comparable_scores(comparable):
    """Otherwise the same share of each kind goes."""
    model = make_model()
    plan = plan_pruning(by_hand(comparable=comparable, foresees_refit=True), model, ratio=0.3, neuron_multiple=1)
    if comparable:
        assert not plan.count("heads") and plan.count("neurons") > NEURONS
    else:
        shares = plan.count("heads") / (LAYERS * HEADS), plan.count("neurons") / (LAYERS * NEURONS)
        assert min(shares) > 0.2 and abs(shares[0] - shares[1]) < 0.15
        assert set(plan.heads[0]) <= set(ALL_HEADS)
