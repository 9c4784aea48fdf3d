"""Computes the metrics of a task for a trainer, and their intervals over the examples."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import evaluate
import numpy as np
from scipy.stats import bootstrap
from transformers import EvalPrediction

from .glue_metric import REGRESSIONS, GlueMetric, glue_figures


CONFIDENCE, RESAMPLES = 0.95, 500
# So many resamples are drawn at a time: they hold a number for each of their examples.
DRAWN = 50


class TaskMetrics:
    """What to give a trainer as `compute_metrics`.

    Args:
        config_name (`str`): A configuration of [`GlueMetric`].
        metric (`str`, *optional*): A further metric of the `evaluate` package, which is reported first: a Hub name, or
            the path of a script. Its code runs.

    Raises:
        ValueError: If the metric cannot be loaded.
    """

    def __init__(self, config_name: str, metric: str | None = None):
        self.config_name = config_name
        self._glue = GlueMetric(config_name, keep_in_memory=True)
        self._name, self._custom = metric, None if metric is None else load_metric(metric)
        self._last: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Computes the metrics of an evaluation; the first one is the one to report."""
        # Some models, such as encoder-decoders, return more than logits. The logits come first.
        predictions = prediction.predictions
        logits = predictions[0] if isinstance(predictions, tuple) else predictions
        regression = self.config_name in REGRESSIONS
        outputs, labels = np.squeeze(logits, -1) if regression else logits.argmax(-1), np.asarray(prediction.label_ids)
        self._last = (outputs, labels)
        return {**self._of_custom(outputs, labels), **self._glue.compute(predictions=outputs, references=labels)}

    def validate(self, labels: Any) -> None:
        """Tries the metrics on labels as their own predictions.

        Raises:
            ValueError: If the custom metric fails.
        """
        values = np.asarray(labels)
        self._of_custom(values, values)

    def intervals(self, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, list[float]]:
        """Bootstraps the metrics of the last evaluation over its examples.

        Args:
            resamples (`int`, *optional*, defaults to 500): How often the examples are drawn again.
            seed (`int`, *optional*, defaults to 0): Seed of the draws.

        Returns:
            `dict[str, list[float]]`: The ends of the 95 % interval of each metric that is defined on every draw.
        """
        if self._last is None:
            return {}
        outputs, labels = self._last
        if len(labels) < 2:
            return {}
        found = _intervals(
            len(labels), resamples, seed, lambda i: glue_figures(self.config_name, outputs[i], labels[i])
        )
        if self._custom is None:
            return found
        return {**found, **_intervals(len(labels), resamples, seed, lambda i: self._of_custom(outputs[i], labels[i]))}

    def _of_custom(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The numbers that the custom metric returns."""
        if self._custom is None:
            return {}
        try:
            result = self._custom.compute(predictions=outputs, references=labels)
        except Exception as error:  # It is the user's code.
            raise ValueError(f"The metric '{self._name}' fails: {type(error).__name__}: {error}") from error
        named = result if isinstance(result, dict) else {self._custom.name: result}
        figures = {name: float(value) for name, value in named.items() if isinstance(value, Real)}
        if not figures:
            raise ValueError(f"The metric '{self._name}' returns no number: {result!r}.")
        return figures


def load_metric(name: str) -> evaluate.EvaluationModule:
    """Loads a metric of the `evaluate` package.

    Args:
        name (`str`): A Hub name, the path of a script, or a folder with a script of the same name.

    Raises:
        ValueError: If there is no such metric, or its script fails.
    """
    try:
        return evaluate.load(name, keep_in_memory=True)
    except Exception as error:  # A script of the user's is imported.
        raise ValueError(
            f"The metric '{name}' cannot be loaded: {type(error).__name__}: {error} Give the path of a script with a "
            "subclass of evaluate.Metric, or the name of a metric on the Hub."
        ) from error


def _intervals(
    count: int, resamples: int, seed: int, figures: Callable[[np.ndarray], dict[str, float]]
) -> dict[str, list[float]]:
    """Percentile intervals of figures over draws of the numbers of examples."""
    names = list(figures(np.arange(count)))

    def statistic(rows: np.ndarray) -> np.ndarray:
        try:
            found = figures(rows)
        except ValueError:  # Some metrics are undefined for a single class.
            found = {}
        return np.array([found.get(name, np.nan) for name in names])

    drawn = bootstrap(
        (np.arange(count),),
        statistic,
        n_resamples=resamples,
        batch=DRAWN,
        vectorized=False,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),  # Its name in every release of SciPy.
    ).confidence_interval
    ends = zip(names, np.atleast_1d(drawn.low), np.atleast_1d(drawn.high), strict=True)
    return {name: [float(low), float(high)] for name, low, high in ends if np.isfinite([low, high]).all()}
