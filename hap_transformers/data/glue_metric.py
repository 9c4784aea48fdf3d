"""GLUE's metrics as a metric of the `evaluate` package, without a download."""

from collections.abc import Callable

import evaluate
import numpy as np
from datasets import Features, Value
from scipy.stats import rankdata


Figure = Callable[[np.ndarray, np.ndarray], float]


def _accuracy(references: np.ndarray, predictions: np.ndarray) -> float:
    return np.mean(references == predictions)


def _f1(references: np.ndarray, predictions: np.ndarray) -> float:
    found = np.sum((references == 1) & (predictions == 1))
    named = np.sum(references == 1) + np.sum(predictions == 1)
    return 2 * found / named if named else 0.0


def _pearson(references: np.ndarray, predictions: np.ndarray) -> float:
    """The correlation, 0 where it is undefined, NaN for values that are not finite."""
    if not (np.isfinite(references).all() and np.isfinite(predictions).all()):
        return float("nan")
    if np.ptp(references) == 0 or np.ptp(predictions) == 0:
        return 0.0
    x, y = references - references.mean(), predictions - predictions.mean()
    return float(np.nan_to_num(x @ y / np.sqrt((x @ x) * (y @ y))))


def _spearman(references: np.ndarray, predictions: np.ndarray) -> float:
    if not (np.isfinite(references).all() and np.isfinite(predictions).all()):
        return float("nan")
    return _pearson(rankdata(references), rankdata(predictions))


def _matthews(references: np.ndarray, predictions: np.ndarray) -> float:
    """Of two classes, the correlation of their numbers."""
    return _pearson(references.astype(float), predictions.astype(float))


ACCURACY: dict[str, Figure] = {"accuracy": _accuracy}
CORRELATIONS: dict[str, Figure] = {"pearson": _pearson, "spearmanr": _spearman}
FIGURES: dict[str, dict[str, Figure]] = {
    "cola": {"matthews_correlation": _matthews},
    **dict.fromkeys(("mrpc", "qqp"), {**ACCURACY, "f1": _f1}),
    **dict.fromkeys(("mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "sst2", "wnli"), ACCURACY),
    "stsb": CORRELATIONS,
    "classification": ACCURACY,
    "regression": CORRELATIONS,
}
REGRESSIONS = ("stsb", "regression")


class GlueMetric(evaluate.Metric):
    """The metrics of a GLUE task, with the interface of the `evaluate` package. Needs no network.

    Args:
        config_name (`str`): A GLUE task: `"cola"` (Matthews' correlation), `"mrpc"` and `"qqp"` (accuracy and F1),
            `"stsb"` (Pearson's and Spearman's correlation, 0 for constant predictions), `"mnli"`, `"mnli_matched"`,
            `"mnli_mismatched"`, `"qnli"`, `"rte"`, `"sst2"` or `"wnli"` (accuracy). Other data take
            `"classification"` (accuracy) or `"regression"` (both correlations).
        kwargs: Those of `evaluate.Metric`, such as `keep_in_memory`.

    Example:

    ```python
    metric = GlueMetric("mrpc")
    metric.compute(predictions=[1, 0, 1], references=[1, 1, 1])  # {"accuracy": 0.667, "f1": 0.8}
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in FIGURES:
            raise ValueError(f"GlueMetric knows no task '{self.config_name}'; choose one of {', '.join(FIGURES)}.")
        value = Value("float64" if self.config_name in REGRESSIONS else "int64")
        return evaluate.MetricInfo(
            description=f"The metrics of GLUE's task {self.config_name}: {', '.join(FIGURES[self.config_name])}.",
            citation="Wang et al. (2019): GLUE, a multi-task benchmark and analysis platform for natural language "
            "understanding. ICLR.",
            inputs_description="\n            predictions: Numbers of the classes, or values of the regression.\n"
            "            references: The labels, likewise.\n",
            features=Features({"predictions": value, "references": value}),
            reference_urls=["https://gluebenchmark.com"],
            format="numpy",
        )

    def _compute(self, *, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return glue_figures(self.config_name, predictions, references)


def glue_figures(config_name: str, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Computes the metrics of a configuration of [`GlueMetric`].

    Raises:
        ValueError: If there are no examples.
    """
    if not len(references):
        raise ValueError(f"The metrics of '{config_name}' need at least one example.")
    x, y = np.asarray(references), np.asarray(predictions)
    return {name: float(figure(x, y)) for name, figure in FIGURES[config_name].items()}
