"""GLUE's official metrics, by scikit-learn and scipy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.int64] | NDArray[np.float64]


def accuracy(labels: Values, predictions: Values) -> float:
    """Share of equal entries."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def f1(labels: Values, predictions: Values) -> float:
    """F1 of label 1; 0 where nothing is labelled or predicted 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0))


def matthews(labels: Values, predictions: Values) -> float:
    """Matthews correlation; 0 for constant predictions."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: Values, predictions: Values) -> float:
    """Linear correlation; 0 for constant predictions, where it is undefined."""
    from scipy.stats import pearsonr

    return _defined(lambda: float(pearsonr(predictions, labels)[0]))


def spearman(labels: Values, predictions: Values) -> float:
    """Rank correlation; 0 for constant predictions, where it is undefined."""
    from scipy.stats import spearmanr

    return _defined(lambda: float(spearmanr(predictions, labels)[0]))


METRICS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""By name; each takes labels [n] and predictions [n]: numbers of labels, or scores."""


def score(metrics: Sequence[str], labels: Values, predictions: Values) -> dict[str, float]:
    """These metrics of predictions [n] beside labels [n]."""
    return {name: METRICS[name](labels, predictions) for name in metrics}


def task_score(by_split: Mapping[str, Mapping[str, float]]) -> float:
    """One number of a task, as on GLUE's board: the mean of its metrics, then of its dev splits."""
    return float(np.mean([np.mean(list(values.values())) for values in by_split.values()]))


def _defined(correlation: Callable[[], float]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant input
        value = correlation()
    return 0.0 if math.isnan(value) else value
