"""Loss and logits are found in every form of outputs that `Trainer` accepts."""

import pytest
import torch
from tiny import make_batch, make_model
from torch.nn import functional as F
from transformers.utils import ModelOutput

from hap_transformers import estimate_sensitivity
from hap_transformers.sensitivity.outputs import logits_of, loss_of, named_tensors


@pytest.fixture
def tensors():
    """Hidden states, two logits that come from them, and the loss of both logits."""
    hidden = torch.randn(3, 4, requires_grad=True) * 1
    start, end = hidden * 2, hidden * 3
    return {"hidden": hidden, "start": start, "end": end, "loss": (start + end).sum()}


def test_logits_by_name(tensors):
    named = ModelOutput(loss=tensors["loss"], start_logits=tensors["start"], states=(tensors["hidden"],))
    assert logits_of(named, tensors["loss"]) == {"start_logits": tensors["start"]}
    nested = {"head": {"logits": tensors["end"]}, "ids": torch.tensor([1])}
    assert logits_of(nested, tensors["loss"]) == {"head.logits": tensors["end"]}


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_logits_without_names_are_what_the_loss_was_computed_from(tensors, form):
    """The loss depends on hidden states, too, but only through the logits."""
    order = ("loss", "start", "hidden", "end")
    outputs = {name[0]: tensors[name] for name in order} if form is dict else form(tensors[name] for name in order)
    found = logits_of(outputs, tensors["loss"])
    assert list(found.values()) == [tensors["start"], tensors["end"]]
    assert list(found) == (["s", "e"] if form is dict else ["1", "3"])


def test_outputs_without_logits(tensors):
    assert logits_of({"other": torch.randn(3)}, tensors["loss"]) == {}
    assert logits_of(tensors["end"], tensors["loss"]) == {"": tensors["end"]}


def test_losses(tensors):
    loss = tensors["loss"]
    assert loss_of({"loss": loss}) is loss and loss_of((loss, tensors["start"])) is loss
    assert loss_of((torch.ones(1, 1, requires_grad=True),)) is None  # The value of one example.
    assert loss_of((tensors["start"],)) is None and loss_of({"logits": loss}) is None and loss_of(loss) is None


def test_named_tensors_are_of_floating_point():
    outputs = {"a": (torch.ones(1), torch.tensor([1])), "b": None, "c": [{"d": torch.zeros(2)}]}
    assert list(named_tensors(outputs)) == ["a.0", "c.0.d"]


@pytest.mark.parametrize("method", ["kronecker", "gauss_newton_trace", "fisher"])
def test_a_model_that_returns_tuples_is_scored_alike(method):
    model, batch = make_model(), make_batch()
    expected = estimate_sensitivity(model, [batch], method, progress=False)
    model.config.return_dict = False

    def loss_fn(model, inputs):
        return F.cross_entropy(model(**inputs)[1], inputs["labels"])

    for settings in ({}, {"loss_fn": loss_fn}):
        found = estimate_sensitivity(model, [batch], method, progress=False, **settings)
        torch.testing.assert_close(found.scores, expected.scores)
