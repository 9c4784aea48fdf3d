"""Metrics for a trainer: their bootstrap intervals, and metrics of the user's own."""

import time

import numpy as np
import pytest
from scipy.stats import bootstrap
from transformers import EvalPrediction

from hap_transformers.data.task_metrics import TaskMetrics, load_metric
from hap_transformers.tasks import Task


pytestmark = pytest.mark.any_release


def answers(count=1500, regression=False):
    draw = np.random.default_rng(0)
    labels = draw.normal(size=count) if regression else draw.integers(0, 2, count)
    logits = np.zeros((count, 1 if regression else 2))
    logits[:, -1] = labels + draw.normal(size=count) - (0 if regression else 0.5)
    return EvalPrediction(logits, labels)


def write_metric(path, body, features="int64"):
    """A script as users write them."""
    path.write_text(
        "import datasets\nimport evaluate\n"
        "class Own(evaluate.Metric):\n"
        "    def _info(self):\n"
        f"        value = datasets.Value('{features}')\n"
        "        features = datasets.Features({'predictions': value, 'references': value})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        f"        {body}\n"
    )
    return str(path)


@pytest.mark.parametrize("name", ["mrpc", "cola", "sst2", "regression"])
def test_intervals_are_those_of_another_bootstrap(name):
    metrics = TaskMetrics(name)
    given = answers(regression=name == "regression")
    values = metrics(given)
    start = time.perf_counter()
    found = metrics.intervals()
    assert time.perf_counter() - start < 2
    assert found == metrics.intervals() and found != metrics.intervals(seed=1) and list(found) == list(values)
    for metric, (low, high) in found.items():
        assert low < values[metric] < high
    if name == "sst2":
        right = given.predictions.argmax(-1) == given.label_ids
        expected = bootstrap((right,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(1))
        # Ends of 500 draws scatter by a tenth of the interval.
        width = expected.confidence_interval.high - expected.confidence_interval.low
        ends = (expected.confidence_interval.low, expected.confidence_interval.high)
        assert found["accuracy"] == pytest.approx(ends, abs=width / 6)


def test_intervals_of_next_to_no_examples():
    metrics = TaskMetrics("mrpc")
    assert metrics.intervals() == {}
    metrics(EvalPrediction(np.array([[0.0, 1.0]]), np.array([1])))
    assert metrics.intervals() == {}
    metrics(EvalPrediction(np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([1, 0])))
    assert metrics.intervals()["accuracy"] == [0, 1]


def test_a_metric_of_the_users_own(tmp_path):
    script = write_metric(
        tmp_path / "errors.py", "return {'errors': sum(p != r for p, r in zip(predictions, references))}"
    )
    metrics = Task("custom", None, (), ["a", "b"]).metrics(script)
    given = answers(60)
    values = metrics(given)
    wrong = int(np.sum(given.predictions.argmax(-1) != given.label_ids))
    assert list(values) == ["errors", "accuracy"] and values == {"errors": wrong, "accuracy": 1 - wrong / 60}
    intervals = metrics.intervals(resamples=50)
    assert intervals["errors"][0] < wrong < intervals["errors"][1] and "accuracy" in intervals
    folder = tmp_path / "folder_metric"
    folder.mkdir()
    write_metric(folder / "folder_metric.py", "return 0.5")
    assert TaskMetrics("sst2", str(folder))(given)["own"] == 0.5  # A bare number has the metric's name.


def test_a_metric_that_is_undefined_for_some_draws(tmp_path):
    body = "return {'own': 1 / len({*references} - {0})}"  # Fails where only class 0 was drawn.
    metrics = TaskMetrics("sst2", write_metric(tmp_path / "own.py", body))
    metrics(EvalPrediction(np.eye(2)[[0, 1, 0]], np.array([0, 1, 0])))
    assert list(metrics.intervals()) == ["accuracy"]


@pytest.mark.parametrize(
    "body, message",
    [
        ("raise KeyError('pos_label')", "own.py' fails: KeyError: 'pos_label'"),
        ("return {'report': 'good'}", "own.py' returns no number: {'report': 'good'}"),
    ],
)
def test_a_metric_that_fails(tmp_path, body, message):
    metrics = TaskMetrics("sst2", write_metric(tmp_path / "own.py", body))
    with pytest.raises(ValueError, match=message):
        metrics.validate([0, 1])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "own.py' cannot be loaded: FileNotFoundError"),
        ("import nowhere_to_be_found", "cannot be loaded: ImportError: .*nowhere_to_be_found"),
        ("x = (", "cannot be loaded: SyntaxError"),
        ("x = 1", "cannot be loaded"),
    ],
)
def test_a_script_that_cannot_be_loaded(tmp_path, content, message):
    if content is not None:
        (tmp_path / "own.py").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_metric(str(tmp_path / "own.py"))
