"""A loss without curvature ranks nothing: it is refused by name, and scores that are all equal are reported."""

import pytest
import torch
from tiny import make_batch, make_model
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from hap_transformers import METHODS, HapConfig, Method, estimate_sensitivity, register_method


BATCH = make_batch(4)
NEED_CURVATURE = ["kronecker", "gauss_newton_trace", "fisher"]


def logits_of(model, batch):
    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def signs(batch):
    return batch["labels"] * 2.0 - 1


def absolute_error(model, batch):
    """Targets are far away, so it is linear here."""
    return F.l1_loss(logits_of(model, batch)[:, 0], batch["labels"].double() + 1e3)


def huber(model, batch):
    return F.huber_loss(logits_of(model, batch)[:, 0], batch["labels"].double() + 1e3)


def hinge(model, batch):
    """Within its margin: every example adds to the loss."""
    return F.relu(1e3 - signs(batch) * logits_of(model, batch)[:, 0]).mean()


def hinge_beyond(model, batch):
    """Beyond its margin: no example adds to the loss."""
    return F.relu(logits_of(model, batch)[:, 0] - 1e3).mean()


def saturated(model, batch):
    """Every class is certain, so probabilities no longer change."""
    return F.cross_entropy(1e6 * logits_of(model, batch), batch["labels"])


def linear(model, batch):
    return (signs(batch) * logits_of(model, batch)[:, 0]).mean()


def offered_by(caught):
    return str(caught.value).rpartition("or one of ")[2].rstrip(".").split(", ")


@pytest.fixture
def warnings(monkeypatch):
    heard = []
    monkeypatch.setattr("hap_transformers.sensitivity.estimate.logger.warning", heard.append)
    return heard


@pytest.mark.parametrize("method", NEED_CURVATURE)
@pytest.mark.parametrize("loss", [absolute_error, huber, hinge, hinge_beyond, saturated], ids=lambda f: f.__name__)
def test_a_loss_without_curvature_is_refused_by_name(loss, method):
    with pytest.raises(ValueError, match="All scores are zero") as caught:
        estimate_sensitivity(make_model(), [BATCH], method, loss_fn=loss, progress=False)
    message = str(caught.value)
    assert f"'{loss.__name__}'" in message and f"'{method}'" in message
    offered = offered_by(caught)
    assert set(offered) == {name for name, known in METHODS.items() if known.curvature != "logits"}
    for other in set(offered) - {"hessian_trace"}:  # What is offered works.
        estimate_sensitivity(make_model(), [BATCH], other, loss_fn=loss, progress=False)


@pytest.mark.parametrize("method", NEED_CURVATURE)
def test_a_linear_loss_is_refused(method):
    with pytest.raises(ValueError, match="The loss 'linear' is linear in the model's logits") as caught:
        estimate_sensitivity(make_model(), [BATCH], method, loss_fn=linear, progress=False)
    assert set(offered_by(caught)) == {name for name, known in METHODS.items() if known.curvature != "logits"}


@pytest.mark.parametrize("method", NEED_CURVATURE)
def test_a_loss_of_other_outputs_is_refused(method):
    """The model returns logits that the loss was not computed from."""

    class Copying(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, labels=None):
            outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
            return {"loss": outputs.loss, "logits": 2 * outputs.logits}

    model = Copying(make_model().config).double().eval()
    with pytest.raises(ValueError, match="The loss of Copying does not depend on the logits that") as caught:
        estimate_sensitivity(model, [BATCH], method, progress=False)
    assert "gradient" in offered_by(caught)


def test_the_models_own_loss_is_named():
    model, batch = make_model(num_labels=1), {**BATCH, "labels": BATCH["labels"].double()}
    with torch.no_grad():  # No component reaches the logits.
        model.classifier.weight.zero_()
    with pytest.raises(ValueError, match="the loss of BertForSequenceClassification has no curvature"):
        estimate_sensitivity(model, [batch], progress=False)


@pytest.mark.parametrize("loss", [absolute_error, huber, hinge, linear], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", ["gradient", "hessian_trace"])
def test_methods_that_are_offered_rank(loss, method, warnings):
    found = estimate_sensitivity(make_model(), [BATCH], method, loss_fn=loss, progress=False)
    assert all(layer.unique().numel() == layer.numel() for layer in (*found.heads, *found.neurons))
    assert not any("are equal" in warning for warning in warnings)


@pytest.mark.parametrize("method", NEED_CURVATURE)
def test_curvature_of_a_single_example_is_enough(method):
    """One target is close to its kink, on the curved side of a Huber loss."""

    def nearly_linear(model, batch):
        logits = logits_of(model, batch)[:, 0]
        targets = logits.detach() + torch.tensor([0.1, 1e3, 1e3, 1e3])
        return F.huber_loss(logits, targets)

    found = estimate_sensitivity(make_model(), [BATCH], method, loss_fn=nearly_linear, progress=False)
    first = {name: value[:1] for name, value in BATCH.items()}

    def squared_error(model, batch):
        logits = logits_of(model, batch)[:, 0]
        return F.mse_loss(logits, logits.detach() + 0.1) / 2

    if method != "kronecker":  # Of whose factors one is that of all examples.
        expected = estimate_sensitivity(make_model(), [first], method, loss_fn=squared_error, progress=False)
        torch.testing.assert_close([4 * layer for layer in found.heads], expected.heads, rtol=1e-6, atol=0)
    assert all((layer > 0).all() for layer in found.heads)


def test_equal_scores_of_all_layers_are_warned_about(warnings):
    found = estimate_sensitivity(make_model(), [BATCH], "gradient", loss_fn=hinge_beyond, progress=False)
    assert not any(layer.any() for layer in (*found.heads, *found.neurons))
    for kind in ("heads", "neurons"):
        assert f"The scores of all {kind} are equal in all layers: 'gradient' does not rank them." in warnings


@pytest.mark.parametrize("method", ["kronecker", "gradient", "magnitude"])
def test_equal_scores_of_one_layer_are_warned_about(method, warnings):
    model = make_model()
    with torch.no_grad():  # Neurons that are alike, and give nothing.
        for name in ("intermediate", "output"):
            dense = model.bert.encoder.layer[1].get_submodule(name).dense
            dense.weight.zero_()
            dense.bias.zero_()
    estimate_sensitivity(model, [BATCH], method, progress=False)
    told = [warning for warning in warnings if "are equal" in warning]
    assert told == [f"The scores of all neurons are equal in layers [1]: '{method}' does not rank them."]


def test_equal_scores_of_a_method_of_ones_own_are_warned_about(warnings):
    register_method("all alike", Method(sample=None, finish=lambda task, means: torch.ones_like(task.squared_norms)))
    try:
        estimate_sensitivity(make_model(), [], "all alike", progress=False)
    finally:
        METHODS.pop("all alike")
    assert sum("'all alike' does not rank them" in warning for warning in warnings) == 2


def test_unequal_scores_and_single_components_are_not_warned_about(warnings):
    model = make_model(num_attention_heads=1)
    for method in ("kronecker", "gradient"):
        estimate_sensitivity(model, [BATCH], method, progress=False)
    assert not any("are equal" in warning for warning in warnings)


# Losses whose second derivative torch does not have.


def multi_margin(model, batch):
    return F.multi_margin_loss(logits_of(model, batch), batch["labels"])


def ctc(model, batch):
    logits = logits_of(model, batch).log_softmax(-1)[:, None]
    return F.ctc_loss(logits, torch.tensor([[1]]), torch.tensor([len(logits)]), torch.tensor([1]))


def distances(model, batch):
    return torch.cdist(logits_of(model, batch), signs(batch).double()[:, None].expand(-1, 2)).mean()


class Fused(torch.autograd.Function):
    """A squared error with a backward pass of its own, as fused kernels have."""

    @staticmethod
    def forward(context, logits):
        context.save_for_backward(logits)
        return logits.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, cotangent):
        (logits,) = context.saved_tensors
        return cotangent * 2 * logits / logits.numel()


def fused(model, batch):
    return Fused.apply(logits_of(model, batch))


def fused_inside(model, batch):
    return Fused.apply(logits_of(model, batch)).sqrt()


def fused_beside(model, batch):
    logits = logits_of(model, batch)
    return Fused.apply(logits) + F.cross_entropy(logits, batch["labels"])


FUSED = [fused, fused_inside, fused_beside]


@pytest.mark.parametrize("method", NEED_CURVATURE)
@pytest.mark.parametrize("loss", [multi_margin, ctc, distances], ids=lambda f: f.__name__)
def test_a_loss_without_a_second_derivative_is_named(loss, method):
    with pytest.raises(ValueError, match=f"no second derivative of the loss '{loss.__name__}'") as caught:
        estimate_sensitivity(make_model(), [BATCH], method, loss_fn=loss, progress=False)
    assert "gradient, magnitude, random" in str(caught.value) and caught.value.__cause__ is not None


@pytest.mark.parametrize("loss", [multi_margin, ctc, distances], ids=lambda f: f.__name__)
def test_it_is_named_for_the_hessian_in_the_weights(loss):
    with pytest.raises(ValueError, match=f"no second derivative of the loss '{loss.__name__}'.*in the weights"):
        estimate_sensitivity(make_model(), [BATCH], "hessian_trace", loss_fn=loss, progress=False)


@pytest.mark.parametrize("method", [*NEED_CURVATURE, "hessian_trace"])
@pytest.mark.parametrize("loss", FUSED, ids=lambda f: f.__name__)
def test_a_loss_that_can_be_differentiated_once_is_named(loss, method):
    """torch leaves such a part out of second derivatives without an error, so scores would be wrong."""
    with pytest.raises(ValueError, match=f"no second derivative of the loss '{loss.__name__}'"):
        estimate_sensitivity(make_model(), [BATCH], method, loss_fn=loss, progress=False)


@pytest.mark.parametrize("loss", [multi_margin, ctc, distances, *FUSED], ids=lambda f: f.__name__)
def test_gradients_do_not_need_it(loss):
    found = estimate_sensitivity(make_model(), [BATCH], "gradient", loss_fn=loss, progress=False)
    assert all(layer.isfinite().all() and layer.any() for layer in (*found.heads, *found.neurons))


def test_what_is_offered_can_be_configured():
    for name, method in METHODS.items():
        if method.curvature is None:
            assert HapConfig(method=name).method == name
