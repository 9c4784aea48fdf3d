"""Losses with a `torch.autograd.Function` of one's own, of whose curvature torch may say nothing."""

import pytest
import torch
from tiny import make_batch, make_model
from torch.nn import functional as F
from trainers import make_trainer

from hap_transformers import HapConfig, estimate_sensitivity


BATCH = make_batch(4)
METHODS = ["kronecker", "gauss_newton_trace", "fisher", "hessian_trace"]


class InForward(torch.autograd.Function):
    """A cross-entropy that computes its gradient in the forward pass, as Liger's does."""

    @staticmethod
    def forward(context, logits, labels):
        with torch.enable_grad():
            free = logits.detach().requires_grad_()
            loss = F.cross_entropy(free, labels)
            (gradient,) = torch.autograd.grad(loss, free)
        context.save_for_backward(gradient)
        return loss.detach()

    @staticmethod
    def backward(context, cotangent):
        return cotangent * context.saved_tensors[0], None


class InPlace(torch.autograd.Function):
    """A loss whose backward pass overwrites what its own derivative needs."""

    @staticmethod
    def forward(context, logits):
        context.save_for_backward(logits)
        return logits.exp().mean()

    @staticmethod
    def backward(context, cotangent):
        (logits,) = context.saved_tensors
        return logits.exp().mul_(2).mul_(cotangent / 2 / logits.numel())


def logits_of(model, batch):
    return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def in_forward(model, batch):
    logits = logits_of(model, batch)
    return InForward.apply(logits, batch["labels"]) + 1e-3 * logits.square().mean()


def in_place(model, batch):
    return InPlace.apply(logits_of(model, batch))


@pytest.fixture
def warnings(monkeypatch):
    heard = []
    monkeypatch.setattr("hap_transformers.sensitivity.second_derivatives.logger.warning_once", heard.append)
    return heard


@pytest.mark.parametrize("method", METHODS)
def test_functions_are_warned_about_by_name(method, warnings):
    estimate_sensitivity(make_model(), [BATCH], method, loss_fn=in_forward, progress=False)
    told = [warning for warning in warnings if "'in_forward' goes through InForward" in warning]
    assert told and "gradient, magnitude, random" in told[0]


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_torch_are_not_warned_about(method, warnings):
    estimate_sensitivity(make_model(), [BATCH], method, progress=False)
    assert not warnings


@pytest.mark.parametrize("method", METHODS)
def test_a_backward_pass_that_works_in_place_is_named(method):
    with pytest.raises(ValueError, match="no second derivative of the loss 'in_place'.*inplace operation"):
        estimate_sensitivity(make_model(), [BATCH], method, loss_fn=in_place, progress=False)


def linear(outputs, labels, num_items_in_batch=None):
    return (outputs["logits"][:, 0] * (2 * labels - 1)).mean()


def test_a_trainers_loss_is_named(tmp_path):
    """By the function that users know: their own, or the model's."""
    from hap_transformers import HapTrainer

    class Own(HapTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            loss = linear(outputs, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    config = HapConfig(max_examples=8)
    own = make_trainer(tmp_path, Own, hap_config=config)
    with pytest.raises(ValueError, match="The loss '.*Own.compute_loss' is linear in"):
        own.estimate_sensitivity()
    plain = make_trainer(tmp_path, hap_config=config)
    arguments = {"args": plain.args, "train_dataset": plain.train_dataset, "hap_config": config}
    by_function = HapTrainer(make_model(dtype=torch.float32), compute_loss_func=linear, **arguments)
    with pytest.raises(ValueError, match="The loss 'linear' is linear in"):
        by_function.estimate_sensitivity()
    with torch.no_grad():  # No component reaches the logits.
        plain.model.classifier.weight.zero_()
    with pytest.raises(ValueError, match="the loss 'BertForSequenceClassification.forward' has no curvature"):
        plain.estimate_sensitivity()
