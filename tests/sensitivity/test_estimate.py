"""Every method restores the model and refuses wrong input."""

import copy

import pytest
import torch
from tiny import make_batch, make_model
from zoo import HEADS

from hap_transformers import METHODS, Sensitivity, estimate_sensitivity


SAMPLED = [method for method in METHODS if method not in ("magnitude", "random")]


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture(params=SAMPLED)
def sampled_method(request) -> str:
    return request.param


def test_leaves_the_model_as_it_was(method, scored_model_type):
    model, batch = make_model(scored_model_type, torch.float32).train(), make_batch()
    model.get_submodule(model.base_model_prefix).eval()
    names = [name for name, _ in model.named_parameters()]
    model.get_parameter(names[3]).requires_grad_(False)
    model(**batch).loss.backward()
    before = copy.deepcopy(model)
    for parameter, original in zip(before.parameters(), model.parameters(), strict=True):
        parameter.grad = None if original.grad is None else original.grad.clone()
    random_state = torch.get_rng_state()
    estimate_sensitivity(model, [batch], method, progress=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert model.config._attn_implementation == before.config._attn_implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for parameter, original in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, original) and parameter.requires_grad == original.requires_grad
        assert (parameter.grad is None) == (original.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, original.grad)


def test_dropout_is_off(method):
    """Two runs on a training model would differ with dropout."""
    model = make_model(hidden_dropout_prob=0.5).train()
    first, second = (estimate_sensitivity(model, [make_batch()], method, progress=False) for _ in range(2))
    assert torch.equal(torch.stack(first.heads), torch.stack(second.heads))


def test_state_is_restored_after_an_error(sampled_method):
    model = make_model().train()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="cannot be computed"):
        estimate_sensitivity(
            model, [{**make_batch(), "labels": torch.tensor([0, 1, 7])}], sampled_method, progress=False
        )
    assert model.training and not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_pruned_layers_have_no_scores(method):
    model = make_model()
    model.prune_heads({0: range(HEADS), 1: [2]})
    result = estimate_sensitivity(model, [make_batch()], method, progress=False)
    assert [len(scores) for scores in result.heads] == [0, HEADS - 1]
    assert [len(scores) for scores in result.neurons] == [24, 24]


def test_components_can_be_scored_alone(method):
    """Only Hutchinson's noise depends on what else is scored."""
    model, batch = make_model(), make_batch()
    both = estimate_sensitivity(model, [batch], method, progress=False)
    for name, other in (("heads", "neurons"), ("neurons", "heads")):
        alone = estimate_sensitivity(model, [batch], method, components=[name], progress=False)
        assert getattr(alone, other) is None and (alone.interactions is None or name == "heads")
        if method not in ("hessian_trace", "random"):
            torch.testing.assert_close(getattr(alone, name), getattr(both, name))
        assert [len(scores) for scores in getattr(alone, name)] == [len(s) for s in getattr(both, name)]


def test_max_examples_cuts_the_last_batch(sampled_method):
    method = sampled_method
    batch = make_batch(size=4)
    cut = estimate_sensitivity(make_model(), [batch, batch], method, max_examples=5, progress=False)
    assert cut.num_examples == 5
    first = estimate_sensitivity(make_model(), [batch, batch], method, max_examples=2, progress=False)
    same = estimate_sensitivity(make_model(), [{k: v[:2] for k, v in batch.items()}], method, progress=False)
    torch.testing.assert_close(first.heads, same.heads)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "magic"}, "Unknown sensitivity method 'magic'.*hessian_trace"),
        ({"batches": []}, "No examples"),
        ({"batches": [(torch.ones(1, 3), torch.ones(1))]}, "Batch 0 is a tuple; give dictionaries"),
        ({"batches": [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], "method": "gradient"}, "no labels"),
        ({"num_probes": 0}, "`num_probes` must be a whole number, 1 or more"),
        ({"max_examples": 0}, "`max_examples` must be a whole number, 1 or more"),
        ({"max_examples": 32.5}, "`max_examples` must be a whole number, 1 or more, got 32.5"),
        ({"num_probes": 2.0}, "`num_probes` must be a whole number, 1 or more, got 2.0"),
        ({"tolerance": 1.0}, "`tolerance` is a reliability and must be in \\(0, 1\\)"),
        (
            {"components": ["columns"]},
            "`components` must name some of embedding_dims, .*channels, layers, got \\['columns'\\]",
        ),
        ({"components": "heads"}, "`components` must name some of"),
        ({"components": []}, "`components` must name some of"),
        ({"precision": "int8"}, "Unknown precision 'int8'.*'bf16', 'fp16'"),
        ({"loss_fn": lambda model, batch: model(**batch).loss * float("nan")}, "finite"),
    ],
)
def test_bad_input(change, message):
    arguments = {"model": make_model(), "batches": [make_batch()], "method": "hessian_trace", "progress": False}
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(**{**arguments, **change})


def test_what_a_batch_has_for_all_examples_is_not_cut(sampled_method):
    """Examples are position ids of shape (1, length) and values that are not tensors."""
    model, batch = make_model(), make_batch(size=20)
    shared = {"position_ids": torch.arange(7)[None].flip(1), **batch, "return_dict": True}
    repeated = {**batch, "position_ids": torch.arange(7).flip(0).expand(20, -1)}
    results = [
        estimate_sensitivity(model, [inputs], sampled_method, max_examples=18, progress=False)
        for inputs in (shared, repeated)
    ]
    torch.testing.assert_close(results[0].heads, results[1].heads)


def test_weights_in_low_precision_are_summed_in_full():
    model = make_model(dtype=torch.bfloat16)
    squares = estimate_sensitivity(model, [], "magnitude").neurons[0] ** 2
    layer = model.double().bert.encoder.layer[0]
    owned = [layer.intermediate.dense.weight, layer.intermediate.dense.bias[:, None], layer.output.dense.weight.T]
    torch.testing.assert_close(squares, sum(w.square().sum(1) for w in owned).detach(), rtol=1e-5, atol=0)


def test_stops_when_the_ranking_is_reliable():
    model, batches = make_model(), [make_batch(seed=seed) for seed in range(12)]
    loose = estimate_sensitivity(model, batches, tolerance=0.3, progress=False)
    assert loose.converged and loose.num_examples < 36 and loose.reliability >= 0.3
    same = estimate_sensitivity(model, batches, max_examples=loose.num_examples, progress=False)
    torch.testing.assert_close(loose.heads, same.heads)
    spent = estimate_sensitivity(model, batches, "hessian_trace", tolerance=0.9999, num_probes=1, progress=False)
    assert spent.converged is False and spent.num_examples == 36 and spent.reliability < 0.9999


def test_nan_weights_are_named():
    model = make_model()
    model.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="loss of batch 0 is nan"):
        estimate_sensitivity(model, [make_batch()], progress=False)


def test_save_and_load(tmp_path, method):
    model = make_model()
    model.prune_heads({0: range(HEADS)})
    result = estimate_sensitivity(model, [make_batch()], method, num_probes=3, progress=False)
    result.save(tmp_path / "s.safetensors")
    loaded = Sensitivity.load(tmp_path / "s.safetensors")
    for name in ("scores", "order", "traces", "stderr"):
        torch.testing.assert_close(getattr(loaded, name), getattr(result, name), rtol=0, atol=0)
    torch.testing.assert_close(loaded.interactions, result.interactions, rtol=0, atol=0)
    for name in (
        "method",
        "comparable",
        "foresees_refit",
        "num_examples",
        "num_probes",
        "reliability",
        "converged",
        "seconds",
    ):
        assert getattr(loaded, name) == getattr(result, name)


def test_loading_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="No sensitivity file"):
        Sensitivity.load(tmp_path / "absent")
    (tmp_path / "other").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a file written by Sensitivity.save"):
        Sensitivity.load(tmp_path / "other")


def test_a_target_of_a_regression_may_be_any_number():
    """Squared errors know no -100 that does not count, whatever else is in the batch."""
    model, found = make_model(num_labels=1), []
    for target in (-100.0, -99.0):
        batches = [{**make_batch(1, seed=seed), "labels": torch.tensor([target]).double()} for seed in range(3)]
        found.append(estimate_sensitivity(model, batches, "kronecker", progress=False))
    assert [result.num_examples for result in found] == [3, 3]  # The curvature of a squared error is the same.
    torch.testing.assert_close(found[0].scores["heads"], found[1].scores["heads"])
