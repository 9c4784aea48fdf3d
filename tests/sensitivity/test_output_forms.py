"""Whatever form a model returns its outputs in, the scores are those of the `ModelOutput` form."""

import copy
import dataclasses

import pytest
import torch
from tiny import make_batch, make_model
from torch.nn import functional as F
from transformers import BertForQuestionAnswering, BertForSequenceClassification, ModernBertForMaskedLM
from zoo import ZOO

from hap_transformers import estimate_sensitivity
from hap_transformers.sensitivity.outputs import logits_of


METHODS = ["kronecker", "gauss_newton_trace", "fisher", "gradient"]
BATCHES = [make_batch(4, seed=seed) for seed in range(2)]
ANSWERS = [
    {**batch, "start_positions": torch.tensor([0, 1, 2, 3]), "end_positions": torch.tensor([2, 3, 3, 1])}
    for batch in ({name: v for name, v in batch.items() if name != "labels"} for batch in BATCHES)
]


def same_weights(model, model_class, **config):
    """A model of another class or with other settings, with the same weights and precision."""
    other = model_class(copy.deepcopy(model.config)).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    for name, value in config.items():
        setattr(other.config, name, value)
    return other


def scores(model, batches, method, **settings):
    result = estimate_sensitivity(model, batches, method, progress=False, **settings)
    return {**result.scores, "interactions": result.interactions, "reliability": result.reliability}


def assert_scored_alike(model, other, batches, method, **settings):
    expected, found = scores(model, batches, method), scores(other, batches, method, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert all(layer.any() for layer in found["heads"])


class Classifier(BertForSequenceClassification):
    """A classifier whose `form` turns its outputs into another form."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels, output_hidden_states=True)
        return type(self).form(outputs)


CLASSIFIERS = {
    "tuple": lambda out: (out.loss, out.logits),
    "list": lambda out: [out.loss, out.logits],
    "dict": dict,
    "dict of other names": lambda out: {"loss": out.loss, "predicted": out.logits},
    "loss of one element": lambda out: (out.loss[None], out.logits),
    "with hidden states": lambda out: (out.loss, out.logits, out.hidden_states),
    "hidden states first": lambda out: (out.loss, out.hidden_states[-1], out.logits),
    "with what is no float": lambda out: (out.loss, out.logits, out.logits.argmax(-1), None, "text"),
    "with a detached copy": lambda out: (out.loss, out.logits.detach(), out.logits),
    "nested": lambda out: {"loss": out.loss, "predicted": {"classes": [out.logits]}},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", CLASSIFIERS)
def test_a_classifiers_own_form(form, method):
    model = make_model(num_labels=3)
    form_class = type("Formed", (Classifier,), {"form": staticmethod(CLASSIFIERS[form])})
    assert_scored_alike(model, same_weights(model, form_class), BATCHES, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["a bare tensor", "a tuple of one", "a named tensor"])
def test_outputs_without_a_loss_and_a_loss_outside(form, method):
    forms = {
        "a bare tensor": (lambda out: out.logits, lambda out: out),
        "a tuple of one": (lambda out: (out.logits,), lambda out: out[0]),
        "a named tensor": (lambda out: {"scores": out.logits}, lambda out: out["scores"]),
    }
    form, logits = forms[form]
    model = make_model(num_labels=3)
    other = same_weights(model, type("Formed", (Classifier,), {"form": staticmethod(form)}))

    def loss_fn(model, batch):
        return F.cross_entropy(logits(model(batch["input_ids"], batch["attention_mask"])), batch["labels"])

    assert_scored_alike(model, other, BATCHES, method, loss_fn=loss_fn)


def make_task(task):
    """A model of a task and its batches."""
    if task == "question answering":
        return dataclasses.replace(ZOO["bert"], task="ForQuestionAnswering").model(), ANSWERS
    if task == "sequence classification":
        return make_model(num_labels=3), BATCHES
    if task == "token classification":
        model = dataclasses.replace(ZOO["bert"], task="ForTokenClassification").model(num_labels=3)
        return model, [{**batch, "labels": batch["input_ids"] % 3} for batch in BATCHES]
    model = dataclasses.replace(ZOO[task], task="ForCausalLM" if task == "llama" else "LMHeadModel").model()
    return model, [{**batch, "labels": batch["input_ids"]} for batch in BATCHES]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["sequence classification", "question answering", "token classification"])
def test_return_dict_false_in_the_config(task, method):
    model, batches = make_task(task)
    other = same_weights(model, type(model), return_dict=False)
    assert isinstance(other(**batches[0]), tuple)
    assert_scored_alike(model, other, batches, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["gpt2", "llama"])
def test_tuples_with_a_cache(task, method):
    """The decoders themselves fail with return_dict=False in the config, but not with it in the call."""
    model, batches = make_task(task)
    assert len(model(**batches[0], return_dict=False)) == 3  # Loss, logits and the cache.
    expected = scores(model, batches, method)
    found = scores(model, [{**batch, "return_dict": False} for batch in batches], method)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("task", ["sequence classification", "question answering", "token classification"])
def test_return_dict_false_with_hidden_states(task):
    model, batches = make_task(task)
    more = {"return_dict": False, "output_hidden_states": True}
    assert_scored_alike(model, same_weights(model, type(model), **more), batches, "kronecker")


class Answers(BertForQuestionAnswering):
    """A model of two heads with one loss, whose `form` nests their logits."""

    def forward(self, input_ids, attention_mask=None, start_positions=None, end_positions=None):
        positions = {"start_positions": start_positions, "end_positions": end_positions}
        return type(self).form(super().forward(input_ids, attention_mask=attention_mask, **positions))


ANSWERERS = {
    "a tuple in a tuple": lambda out: (out.loss, (out.start_logits, out.end_logits)),
    "a tuple in a dict": lambda out: {"loss": out.loss, "logits": (out.start_logits, out.end_logits)},
    "a dict in a dict": lambda out: {"loss": out.loss, "logits": {"start": out.start_logits, "end": out.end_logits}},
    "other names": lambda out: {"loss": out.loss, "answers": {"start": out.start_logits, "end": out.end_logits}},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ANSWERERS)
def test_nested_logits_of_two_heads_with_one_loss(form, method):
    model, batches = make_task("question answering")
    form_class = type("Formed", (Answers,), {"form": staticmethod(ANSWERERS[form])})
    assert_scored_alike(model, same_weights(model, form_class), batches, method)


def test_a_loss_that_no_output_leads_to_is_named():
    def around_the_outputs(model, batch):
        pooled = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        return F.cross_entropy(model.classifier(pooled), batch["labels"])

    for method in ("kronecker", "gauss_newton_trace", "fisher"):
        with pytest.raises(ValueError, match="No output of BertForSequenceClassification leads to .*around_the_out"):
            scores(make_model(), BATCHES, method, loss_fn=around_the_outputs)
    assert scores(make_model(), BATCHES, "gradient", loss_fn=around_the_outputs)["heads"][0].any()


# logits_of


def graph():
    """A hidden state, logits made of it, and a loss made of these."""
    hidden = torch.randn(2, 4, requires_grad=True) * 1
    logits = hidden @ torch.randn(4, 3)
    return hidden, logits, F.cross_entropy(logits, torch.tensor([0, 1]))


def names(outputs, loss):
    return list(logits_of(outputs, loss))


def test_logits_are_found_by_name():
    hidden, logits, loss = graph()
    assert names({"loss": loss, "logits": logits, "hidden_states": (hidden,)}, loss) == ["logits"]
    assert names({"start_logits": logits, "end_logits": logits * 1, "other": hidden}, loss) == [
        "start_logits",
        "end_logits",
    ]
    assert names({"loss": loss, "logits": [logits, {"more": hidden}]}, loss) == ["logits.0", "logits.1.more"]


def test_logits_without_a_name_are_what_the_loss_reaches_first():
    hidden, logits, loss = graph()
    assert logits_of((loss, hidden, logits), loss)["2"] is logits and names((loss, hidden, logits), loss) == ["2"]
    assert names({"x": hidden, "y": logits, "labels": torch.tensor([0, 1])}, loss) == ["y"]
    assert names(logits, loss) == [""] and names((logits,), loss) == ["0"]
    # A loss that also reads the hidden state by itself.
    assert names((hidden, logits), loss + hidden.square().mean()) == ["0", "1"]


def test_what_does_not_lead_to_the_loss_is_not_found():
    hidden, logits, loss = graph()
    assert names((logits.detach(), torch.ones(2), logits.argmax(-1)), loss) == []
    assert names((), loss) == [] and names(None, loss) == [] and names("text", loss) == []
    assert names((loss,), loss) == []
    assert names((logits * 2,), loss) == []  # It comes from the same logits, but does not lead there.


@pytest.mark.parametrize("method", METHODS)
def test_detached_logits_are_passed_over(method):
    """The loss comes from another output; a copy of the logits without gradients is there to be looked at."""

    class Detached(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, labels=None):
            outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
            return {"loss": outputs.loss, "logits": outputs.logits.detach(), "raw": outputs.logits}

    model = make_model()
    assert_scored_alike(model, same_weights(model, Detached), BATCHES, method)


@pytest.mark.parametrize("method", ["kronecker", "gauss_newton_trace", "fisher"])
def test_detached_logits_alone_are_refused(method):
    class Detached(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None, labels=None):
            outputs = super().forward(input_ids, attention_mask=attention_mask, labels=labels)
            return {"loss": outputs.loss, "logits": outputs.logits.detach()}

    model = same_weights(make_model(), Detached)
    with pytest.raises(ValueError, match="No output of Detached leads to the loss of Detached"):
        estimate_sensitivity(model, BATCHES, method, progress=False)


def masked_texts():
    """Eight labels in four texts, not two of each."""
    ids = torch.randint(3, 14, (4, 8), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[0, :5], labels[1:, 2] = ids[0, :5], ids[1:, 2]
    return [{"input_ids": ids, "labels": labels}]


@pytest.mark.parametrize("method", METHODS)
def test_logits_of_labelled_tokens_alone(method):
    """`sparse_prediction` of ModernBERT: the loss is the same, so the scores are."""
    torch.manual_seed(0)
    dense = ModernBertForMaskedLM(ZOO["modernbert"].config(vocab_size=14)).double()
    sparse = same_weights(dense, ModernBertForMaskedLM, sparse_prediction=True)
    sparse.sparse_prediction = True
    assert_scored_alike(dense, sparse, masked_texts(), method)
    assert sparse.sparse_prediction


@pytest.mark.parametrize(
    ("method", "kind"),
    [("kronecker", "heads"), ("fisher", "heads"), ("gauss_newton_trace", "heads"), ("gauss_newton_trace", "layers")],
)
def test_logits_that_are_not_those_of_the_examples_are_named(method, kind):
    class Answered(BertForSequenceClassification):
        """A classifier that leaves out examples whose label is -100."""

        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = super().forward(input_ids, attention_mask=attention_mask).logits[labels >= 0]
            return {"loss": F.cross_entropy(logits, labels[labels >= 0]), "logits": logits}

    model = same_weights(make_model(), Answered)
    batch = {**BATCHES[0], "labels": torch.tensor([0, 1, 1, -100])}
    with pytest.raises(ValueError, match="outputs of 3 rows, which cannot be shared out among 4 examples"):
        estimate_sensitivity(model, [batch], method, components=[kind], progress=False)
