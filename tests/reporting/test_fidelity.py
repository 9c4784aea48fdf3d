"""How far outputs moved is what formulas written out here say, for every kind of output, on what counts alone."""

import math

import pytest
import torch
import transformers
from tiny import make_model
from torch.nn import functional as F
from zoo import ZOO

from hap_transformers import PruningPlan, apply_plan
from hap_transformers.components.forwards import eager_copy
from hap_transformers.reporting.fidelity import measure_fidelity
from hap_transformers.reporting.wording import FIDELITY, fidelity_rows


def both(task, name="bert", **changes):
    """A tiny model, a pruned copy of it, and a batch with padding."""
    tiny = ZOO[name]
    torch.manual_seed(0)
    dense = getattr(transformers, tiny.family + task)(tiny.config(**changes)).double().eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pruned = eager_copy(dense)
    apply_plan(pruned, PruningPlan.for_model(pruned, heads={0: [1, 3]}, neurons={1: range(0, 24, 2)}))
    return pruned, dense, tiny.batch()


def by_hand(ours, theirs):
    """Agreement and KL divergence of rows of logits, in Python numbers."""
    equal, divergences = [], []
    for q, p in zip(ours.tolist(), theirs.tolist(), strict=True):
        p, q = ([math.exp(x - max(row)) for x in row] for row in (p, q))
        p, q = ([x / sum(row) for x in row] for row in (p, q))
        equal.append(p.index(max(p)) == q.index(max(q)))
        divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return {"agreement": sum(equal) / len(equal), "kl": sum(divergences) / len(divergences)}


def assert_found(found, expected):
    assert found == {name: pytest.approx(value, rel=1e-6, abs=1e-9) for name, value in expected.items()}
    assert found.get("kl", 1) > 1e-6  # Something moved.


@pytest.mark.parametrize("batches", [1, 3])
def test_classes(batches):
    pruned, dense, batch = both("ForSequenceClassification", num_labels=3)
    expected = by_hand(pruned(**batch).logits, dense(**batch).logits)
    parts = [{name: value.chunk(batches)[i] for name, value in batch.items()} for i in range(batches)]
    assert_found(measure_fidelity(pruned, dense, parts), expected)
    unchanged = measure_fidelity(dense, dense, parts)
    assert unchanged == {name: pytest.approx(FIDELITY[name][1], abs=1e-9) for name in ("agreement", "kl")}


@pytest.mark.parametrize("task, name", [("ForTokenClassification", "bert"), ("ForMaskedLM", "bert")])
def test_tokens_that_are_not_padding(task, name):
    pruned, dense, batch = both(task, name)
    valid = batch["attention_mask"].bool()
    assert_found(
        measure_fidelity(pruned, dense, [batch]), by_hand(pruned(**batch).logits[valid], dense(**batch).logits[valid])
    )


def test_next_tokens_that_are_not_padding():
    pruned, dense, batch = both("ForCausalLM", "llama")
    rows = [(i, j) for i in range(3) for j in range(6) if batch["attention_mask"][i, j + 1]]
    ours, theirs = (torch.stack([model(**batch).logits[place] for place in rows]) for model in (pruned, dense))
    assert_found(measure_fidelity(pruned, dense, [batch]), by_hand(ours, theirs))


def test_spans():
    pruned, dense, batch = both("ForQuestionAnswering")
    ours, theirs = (
        torch.cat([out.start_logits, out.end_logits]) for out in (model(**batch) for model in (pruned, dense))
    )
    assert_found(measure_fidelity(pruned, dense, [batch]), by_hand(ours, theirs))


def test_several_labels_at_once():
    pruned, dense, batch = both("ForSequenceClassification", num_labels=3, problem_type="multi_label_classification")
    ours, theirs = (model(**batch).logits.flatten() for model in (pruned, dense))
    pairs = [torch.stack([torch.zeros_like(x), x], 1) for x in (ours, theirs)]  # Each label is one of two classes.
    assert_found(measure_fidelity(pruned, dense, [batch]), by_hand(*pairs))


@pytest.mark.parametrize("labels", [1, 2])
def test_values(labels):
    pruned, dense, batch = both("ForSequenceClassification", num_labels=labels, problem_type="regression")
    ours, theirs = (model(**batch).logits.flatten().detach() for model in (pruned, dense))
    spread = (theirs - theirs.mean()).square().mean().sqrt()
    expected = {
        "correlation": float(F.cosine_similarity(ours - ours.mean(), theirs - theirs.mean(), dim=0)),
        "relative_error": float((ours - theirs).square().mean().sqrt() / spread),
    }
    assert_found(measure_fidelity(pruned, dense, [batch]), expected)


def test_equal_values_have_no_correlation():
    pruned, dense, batch = both("ForSequenceClassification", num_labels=1)
    one = {name: value[:1] for name, value in batch.items()}
    assert measure_fidelity(pruned, dense, [one]) == {}


def test_embeddings():
    classifier, dense, batch = both("ForSequenceClassification")
    pruned, dense = classifier.bert, dense.bert
    mask = batch["attention_mask"][..., None]
    ours, theirs = ((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1) for model in (pruned, dense))
    expected = F.cosine_similarity(ours, theirs).mean()
    assert_found(measure_fidelity(pruned, dense, [batch]), {"cosine": float(expected)})
    first = F.cosine_similarity(*(model(**batch).last_hidden_state[:, 0] for model in (pruned, dense))).mean()
    found = measure_fidelity(pruned, dense, [batch], lambda model, inputs: model(**inputs).last_hidden_state[:, 0])
    assert_found(found, {"cosine": float(first)})


def test_images():
    pruned, dense, batch = both("ForImageClassification", "vit")
    assert_found(measure_fidelity(pruned, dense, [batch]), by_hand(pruned(**batch).logits, dense(**batch).logits))


def test_what_cannot_be_compared():
    pruned, dense, batch = both("ForPreTraining")
    assert measure_fidelity(pruned, dense, [batch]) == {}
    with pytest.raises(ValueError, match="There are no examples to compare the models on"):
        measure_fidelity(make_model(), make_model(), [])


def test_models_keep_their_modes():
    pruned, dense, batch = both("ForSequenceClassification")
    pruned.train()
    measure_fidelity(pruned, dense, [batch])
    assert pruned.training and not dense.training and pruned.bert.training


def test_rows_have_words_and_both_ends():
    rows = fidelity_rows({"fidelity": {"kl": 0.25, "agreement": 0.5}})
    assert rows == [("same predictions", "1.0000", "0.5000"), ("KL divergence, nats", "0.0000", "0.2500")]
    assert fidelity_rows({}) == []
