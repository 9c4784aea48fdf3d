"""Scores without labels: those with labels where theory says so, and those of explicit Jacobians for embeddings."""

import pytest
import torch
import transformers
from explicit import scored_weights, sum_by_component
from tiny import make_batch, make_model
from torch.nn import functional as F
from zoo import ZOO

from hap_transformers import SelfLoss, estimate_sensitivity


CURVED = ["kronecker", "gauss_newton_trace", "fisher"]


def of_task(task, name="bert", **changes):
    """A tiny model with another head, and a batch with padding."""
    tiny = ZOO[name]
    torch.manual_seed(0)
    model = getattr(transformers, tiny.family + task)(tiny.config(**changes)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, tiny.batch()


def with_labels(task, model, batch):
    """The same batch with labels on all that the loss without labels counts."""
    size, length = batch["input_ids"].shape[-2:]
    counted = batch["attention_mask"].bool()
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(0, model.config.num_labels, (size, length), generator=generator)
    tokens = torch.randint(0, model.config.vocab_size, (size, length), generator=generator)
    labels = {
        "ForSequenceClassification": {"labels": classes[:, 0]},
        "ForTokenClassification": {"labels": classes.masked_fill(~counted, -100)},
        "ForMaskedLM": {"labels": tokens.masked_fill(~counted, -100)},
        "ForCausalLM": {"labels": tokens.masked_fill(~counted, -100)},
        "ForQuestionAnswering": {"start_positions": classes[:, 0], "end_positions": classes[:, 1] + 1},
    }
    return {**batch, **labels[task]}


def assert_same(found, expected):
    """Transformers computes the losses of language models in float32."""
    for name in ("scores", "traces"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-5, atol=1e-12)
    assert any(layer.any() for layer in found.heads)


@pytest.mark.parametrize("method", CURVED)
@pytest.mark.parametrize(
    "task, name",
    [
        ("ForSequenceClassification", "bert"),
        ("ForTokenClassification", "bert"),
        ("ForMaskedLM", "bert"),
        ("ForQuestionAnswering", "bert"),
        ("ForCausalLM", "llama"),
    ],
)
def test_scores_are_those_with_labels(task, name, method):
    model, batch = of_task(task, name)
    batch = {key: value[:, 2:6] for key, value in batch.items()}  # Each token of a vocabulary has a pass of its own.
    labelled = with_labels(task, model, batch)
    settings = {"exact_directions": 1000, "progress": False}
    expected = estimate_sensitivity(model, [labelled], method, **settings)
    assert_same(estimate_sensitivity(model, [batch], method, **settings), expected)


@pytest.mark.parametrize("method", CURVED)
@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_values_and_several_labels_at_once(problem, method):
    model, batch = of_task("ForSequenceClassification", num_labels=3, problem_type=problem)
    labels = (torch.arange(9).reshape(3, 3) % 2).double()
    expected = estimate_sensitivity(model, [{**batch, "labels": labels}], method, progress=False)
    assert_same(estimate_sensitivity(model, [batch], method, progress=False), expected)


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_models_of_images_and_sounds(name):
    tiny = ZOO[name]
    model, batch = tiny.model(), tiny.batch()
    expected = estimate_sensitivity(model, [{**batch, "labels": torch.tensor([0, 1, 1])}], progress=False)
    assert_same(estimate_sensitivity(model, [batch], progress=False), expected)


def test_multiple_choice():
    model, batch = of_task("ForMultipleChoice")
    batch = {name: value[None].repeat(2, 1, 1) for name, value in batch.items()}
    batch["input_ids"][1] = batch["input_ids"][1].flip(-1)
    expected = estimate_sensitivity(model, [{**batch, "labels": torch.tensor([0, 2])}], progress=False)
    assert_same(estimate_sensitivity(model, [batch], progress=False), expected)


def test_the_hessian_of_the_own_outputs_is_the_gauss_newton_matrix():
    """The other term of the Hessian has the loss's gradient as a factor, which is zero."""
    model, batch = of_task("ForSequenceClassification", "distilbert", n_layers=1)
    exact = estimate_sensitivity(model, [batch], "gauss_newton_trace", progress=False)
    found = estimate_sensitivity(model, [batch] * 100, "hessian_trace", num_probes=8, progress=False)
    difference = torch.cat(found.traces["heads"]) - torch.cat(exact.traces["heads"])
    assert (difference.abs() < 4 * torch.cat(found.stderr["heads"])).all()


def pooled_by_hand(states, mask, pooling):
    """A list of embeddings, token by token."""
    kept = [
        [token for token, counts in zip(tokens, counted, strict=True) if counts]
        for tokens, counted in zip(states, mask.bool().tolist(), strict=True)
    ]
    return {
        "mean": [sum(tokens) / len(tokens) for tokens in kept],
        "cls": [tokens[0] for tokens in kept],
        "last_token": [tokens[-1] for tokens in kept],
        "token": [token for tokens in kept for token in tokens],
    }[pooling]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token", "token"])
def test_embeddings_have_the_traces_of_their_jacobians(pooling, normalize):
    """The squared distance has twice the identity for its Hessian: traces are twice the Jacobian's squared norms."""
    tiny = ZOO["bert"]
    model = tiny.model()
    encoder, batch = model.bert, tiny.batch()
    weights = scored_weights(model)
    names = {name.removeprefix("bert."): name for name in weights}
    squares = {name: torch.zeros_like(value) for name, value in weights.items()}
    inside = {short: dict(encoder.named_parameters())[short] for short in names}
    rows = pooled_by_hand(encoder(**batch).last_hidden_state, batch["attention_mask"], pooling)
    count = 3 * 7 if pooling == "token" else 3  # Padding's embeddings are zero, but count.
    for row in rows:
        embedding = F.normalize(row, dim=0) if normalize else row
        for value in embedding:
            gradients = torch.autograd.grad(value, list(inside.values()), retain_graph=True, allow_unused=True)
            for short, gradient in zip(inside, gradients, strict=True):
                if gradient is not None:
                    squares[names[short]] += 2 * gradient**2 / count
    heads, neurons = sum_by_component(model, squares)
    settings = {"loss_fn": SelfLoss(pooling, normalize), "exact_directions": 7 * 16, "progress": False}
    found = estimate_sensitivity(encoder, [batch], "gauss_newton_trace", **settings)
    torch.testing.assert_close(torch.stack(found.traces["heads"]), heads, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(torch.stack(found.traces["neurons"]), neurons, rtol=1e-8, atol=1e-12)


def test_by_default_texts_are_averaged_and_images_read_at_their_first_token():
    for name, pooling in (("bert", "mean"), ("vit", "cls")):
        tiny = ZOO[name]
        encoder, batch = tiny.model().base_model, tiny.batch()
        found, expected = (
            estimate_sensitivity(encoder, [batch], progress=False, loss_fn=loss)
            for loss in (None, SelfLoss(pooling, normalize=True))
        )
        assert_same(found, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mpnet", "albert", "deberta-v3", "modernbert"])
def test_other_encoders(name):
    tiny = ZOO[name]
    model, batch = tiny.model().base_model, tiny.batch()
    found = estimate_sensitivity(model, [batch], progress=False)
    assert all((layer > 0).any() for layer in (*found.heads, *found.neurons))


def test_many_dimensions_are_sampled_without_bias(monkeypatch):
    """Nothing of the width of the embedding squared is formed."""
    monkeypatch.setattr("hap_transformers.sensitivity.output_curvature.EXPLICIT_CLASSES", 8)
    monkeypatch.setattr(
        "hap_transformers.sensitivity.output_curvature._explicit_factor", lambda *_: pytest.fail("formed")
    )
    encoder, batch = make_model().bert, {name: value for name, value in make_batch().items() if name != "labels"}
    settings = {"method": "gauss_newton_trace", "progress": False}
    found = estimate_sensitivity(encoder, [batch], num_probes=500, exact_directions=8, **settings)
    monkeypatch.undo()
    exact = estimate_sensitivity(encoder, [batch], exact_directions=1000, **settings)
    torch.testing.assert_close(found.heads, exact.heads, rtol=0.25, atol=0)


def test_what_has_no_loss_of_its_own_is_named():
    model, batch = of_task("ForPreTraining")
    with pytest.raises(ValueError, match="BertForPreTraining cannot be scored without labels: .* ForPreTraining"):
        estimate_sensitivity(model, [batch], progress=False)
    with pytest.raises(ValueError, match="Unknown pooling 'max'; choose one of mean, cls"):
        SelfLoss(pooling="max")
