"""The official metrics: equal to scikit-learn's and scipy's, and to their definitions by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fedbert_ds.tasks.glue_tasks import GLUE
from fedbert_ds.tasks.metrics import METRICS, score, task_score

binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)
scores = st.lists(st.tuples(st.integers(0, 20), st.integers(-9, 9)), min_size=3, max_size=40)


@given(binary)
def test_counts_by_hand(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = (np.array(values) for values in zip(*pairs, strict=True))
    both, only_predicted, only_labelled, neither = (
        int(((labels == label) & (predictions == prediction)).sum())
        for label, prediction in ((1, 1), (0, 1), (1, 0), (0, 0))
    )
    assert METRICS["accuracy"](labels, predictions) == pytest.approx((both + neither) / len(pairs))
    relevant = 2 * both + only_predicted + only_labelled
    assert METRICS["f1"](labels, predictions) == pytest.approx(2 * both / relevant if relevant else 0.0)
    product = (both + only_predicted) * (both + only_labelled) * (neither + only_predicted) * (neither + only_labelled)
    by_hand = (both * neither - only_predicted * only_labelled) / math.sqrt(product) if product else 0.0
    assert METRICS["matthews"](labels, predictions) == pytest.approx(by_hand)


@given(scores)
def test_correlations_by_hand(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = (np.array(values, dtype=float) / 4 for values in zip(*pairs, strict=True))
    ranks = [
        np.array([(values < one).sum() + (values == one).sum() / 2 for one in values])
        for values in (labels, predictions)
    ]

    def correlation(one, other):
        if one.std() == 0 or other.std() == 0:
            return 0.0
        return float(np.corrcoef(one, other)[0, 1])

    assert METRICS["pearson"](labels, predictions) == pytest.approx(correlation(labels, predictions), abs=1e-9)
    assert METRICS["spearman"](labels, predictions) == pytest.approx(correlation(*ranks), abs=1e-9)


def test_each_task_as_the_libraries_compute_it() -> None:
    draw = np.random.default_rng(0)
    for name, task in GLUE.items():
        if task.labels is None:
            labels, predictions = draw.uniform(0, 5, 50), draw.normal(size=50)
        else:
            labels, predictions = draw.integers(0, len(task.labels), (2, 50))
        expected = {
            "accuracy": lambda one=labels, other=predictions: accuracy_score(one, other),
            "f1": lambda one=labels, other=predictions: f1_score(one, other),
            "matthews": lambda one=labels, other=predictions: matthews_corrcoef(one, other),
            "pearson": lambda one=labels, other=predictions: pearsonr(one, other).statistic,
            "spearman": lambda one=labels, other=predictions: spearmanr(one, other).statistic,
        }
        found = score(task.metrics, labels, predictions)
        assert found == pytest.approx({metric: expected[metric]() for metric in task.metrics}, abs=1e-12), name


def test_f1_is_of_label_1_alone() -> None:
    labels, predictions = np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])
    assert METRICS["f1"](labels, predictions) == 0.0
    assert METRICS["accuracy"](labels, predictions) == 0.75


def test_a_constant_prediction_has_no_correlation() -> None:
    labels = np.array([1.0, 2.0, 3.0])
    assert METRICS["pearson"](labels, np.ones(3)) == METRICS["spearman"](labels, np.ones(3)) == 0.0


def test_a_tasks_score_is_the_mean_of_metrics_then_of_splits() -> None:
    assert task_score({"dev": {"f1": 0.8, "accuracy": 0.6}}) == pytest.approx(0.7)
    assert task_score({"dev_matched": {"accuracy": 0.8}, "dev_mismatched": {"accuracy": 0.9}}) == pytest.approx(0.85)
