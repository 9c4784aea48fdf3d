"""GLUE's metrics against scikit-learn and SciPy, through the interface of `evaluate`."""

import json
import socket

import evaluate
import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tiny import make_model
from transformers import AutoTokenizer

from hap_transformers.data.glue_metric import FIGURES, GlueMetric
from hap_transformers.tasks import GLUE_TEXTS


EXPECTED = {
    **dict.fromkeys(GLUE_TEXTS, {"accuracy": accuracy_score}),
    **dict.fromkeys(["mrpc", "qqp"], {"accuracy": accuracy_score, "f1": f1_score}),
    "cola": {"matthews_correlation": matthews_corrcoef},
    "stsb": {"pearson": lambda y, z: pearsonr(y, z)[0], "spearmanr": lambda y, z: spearmanr(y, z)[0]},
}


def answers(task, count=50, seed=0):
    """Labels and predictions that agree in part."""
    draw = np.random.default_rng(seed)
    if task == "stsb":
        labels = draw.integers(0, 11, count) / 2  # With ties.
        return labels, labels + draw.normal(size=count)
    labels = draw.integers(0, 3 if task == "mnli" else 2, count)
    return labels, np.where(draw.random(count) < 0.7, labels, 1 - labels)


@pytest.mark.parametrize("task", GLUE_TEXTS)
def test_every_task(task):
    labels, predictions = answers(task)
    expected = {name: function(labels, predictions) for name, function in EXPECTED[task].items()}
    assert GlueMetric(task).compute(predictions=predictions, references=labels) == pytest.approx(expected)
    metric = GlueMetric(config_name=task, keep_in_memory=True)
    for rows in (slice(20), slice(20, None)):
        metric.add_batch(predictions=predictions[rows].tolist(), references=labels[rows].tolist())
    assert metric.compute() == pytest.approx(expected)
    assert metric.name == "glue_metric" and list(expected) == list(FIGURES[task])


@pytest.mark.parametrize("task", ["stsb", "cola", "mrpc"])
def test_constant_answers_count_as_zero(task):
    for labels, predictions in (([0, 1, 1], [0, 0, 0]), ([0, 0, 0], [0, 0, 0]), ([0.1] * 3, [0.1] * 3)):
        found = GlueMetric(task).compute(predictions=predictions, references=labels)
        assert all(value == 0 for name, value in found.items() if name != "accuracy"), found


def test_wrong_names_and_no_examples():
    with pytest.raises(ValueError, match="knows no task 'squad'; choose one of cola"):
        GlueMetric("squad")
    with pytest.raises(ValueError, match="knows no task 'default'"):
        GlueMetric()
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        GlueMetric("sst2").compute(predictions=[1, 0], references=[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_correlations_of_what_is_not_finite_are_no_number(value):
    found = GlueMetric("stsb").compute(predictions=[1.0, value, 2.0], references=[1.0, 2.0, 3.0])
    assert all(np.isnan(figure) for figure in found.values()) and len(found) == 2


def test_combine_and_save(tmp_path):
    both = evaluate.combine([GlueMetric("mrpc"), GlueMetric("cola")])
    found = both.compute(predictions=[1, 0, 1, 1], references=[1, 1, 1, 0])
    assert found == pytest.approx({"accuracy": 0.5, "f1": 2 / 3, "matthews_correlation": -1 / 3})
    file = evaluate.save(tmp_path, **found, model="tiny")
    assert json.loads(file.read_text())["accuracy"] == 0.5


def test_the_evaluator_with_a_bootstrap(model_dir):
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), make_model(vocab_size=40).float()
    model.config.id2label = {0: "no", 1: "yes"}
    texts = [f"{word} film {letter}" for word in ("good", "bad") for letter in "abcdefghijkl"]
    data = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(len(texts))]})
    judged = evaluate.evaluator("text-classification").compute(
        model_or_pipeline=model,
        tokenizer=tokenizer,
        data=data,
        metric=GlueMetric("sst2"),
        label_mapping={"no": 0, "yes": 1},
        strategy="bootstrap",
        n_resamples=20,
        random_state=0,
        device=-1,
    )
    low, high = judged["accuracy"]["confidence_interval"]
    score = judged["accuracy"]["score"]
    logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert score == np.mean(logits.argmax(-1).numpy() == np.array(data["label"])) and not low > score > high


def test_needs_no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("asks the network"))
    assert GlueMetric("qqp").compute(predictions=[1], references=[1]) == {"accuracy": 1, "f1": 1}
