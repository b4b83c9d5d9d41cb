"""Labels and scores of whole texts: encoded as transformers does, measured as scikit-learn does."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.errors import DataError
from fedbert_ds.tasks import metrics
from fedbert_ds.tasks.examples import LabelledText
from fedbert_ds.tasks.sequence_tasks import SequenceClassification, SequenceRegression, encode_texts
from fedbert_ds.tasks.task import Columns, columns_of

TWO, FOUR = SequenceClassification(("no", "yes")), SequenceClassification(("a", "b", "c", "d"))
SCORES = SequenceRegression()


def one_hot(given: list[int], count: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(given, dtype=torch.int64), count).float()


@st.composite
def answers(draw: st.DrawFn, kinds: int) -> tuple[list[int], list[int], list[int]]:
    """(labels, given, bounds of parts)"""
    pairs = draw(st.lists(st.tuples(st.integers(0, kinds - 1), st.integers(0, kinds - 1)), min_size=1, max_size=40))
    cuts = draw(st.lists(st.integers(0, len(pairs)), max_size=4))
    return [a for a, _ in pairs], [b for _, b in pairs], [0, *sorted(cuts), len(pairs)]


def added(task: Any, scores: torch.Tensor, labels: torch.Tensor, bounds: list[int]) -> list[float]:
    """Counts of parts, added up."""
    parts = [task.counts(scores[a:b], labels[a:b], [0, b - a]) for a, b in pairwise(bounds)]
    assert all(len(part) == task.num_counts for part in parts)
    return [sum(values) for values in zip(*parts, strict=True)]


@pytest.mark.parametrize("task", [TWO, FOUR], ids=["two", "four"])
@given(data=st.data())
def test_measures_of_added_counts_are_scikit_learns(task: SequenceClassification, data: Any) -> None:
    from sklearn.metrics import f1_score

    labels, guesses, bounds = data.draw(answers(len(task.labels)))
    have, told = np.array(labels), np.array(guesses)
    measures = task.measures(added(task, one_hot(guesses, len(task.labels)), torch.tensor(labels), bounds))
    assert measures["accuracy"] == pytest.approx(metrics.accuracy(have, told))
    assert measures["matthews"] == pytest.approx(metrics.matthews(have, told), abs=1e-12)
    numbers = list(range(len(task.labels)))
    average = "binary" if len(numbers) == 2 else "macro"
    expected = f1_score(have, told, labels=None if average == "binary" else numbers, average=average, zero_division=0)
    assert measures["f1"] == pytest.approx(expected)


@given(
    pairs=st.lists(st.tuples(st.floats(-5, 5, width=16), st.floats(-5, 5, width=16)), min_size=2, max_size=30),
    cut=st.integers(0, 30),
)
def test_the_correlation_of_added_counts_is_scipys(pairs: list[tuple[float, float]], cut: int) -> None:
    have, told = (torch.tensor(column) for column in zip(*pairs, strict=True))
    cut = min(cut, len(pairs))
    measures = SCORES.measures(added(SCORES, told[:, None], have, [0, cut, len(pairs)]))
    assert measures["rmse"] == pytest.approx(math.sqrt(float(((have - told).double() ** 2).mean())), abs=1e-6)
    spreads = have.double().std() * told.double().std()
    if spreads > 1e-3:
        expected = metrics.pearson(have.double().numpy(), told.double().numpy())
        assert measures["pearson"] == pytest.approx(expected, abs=1e-6)


def test_measures_without_spread_or_examples_are_nothing() -> None:
    assert SCORES.measures([0.0] * 6) == {"pearson": 0.0, "rmse": 0.0}
    assert SCORES.measures(SCORES.counts(torch.ones(3, 1), torch.tensor([1.0, 2, 3]), [0, 3]))["pearson"] == 0.0
    assert TWO.measures([0.0] * 6) == {"accuracy": 0.0, "f1": 0.0, "matthews": 0.0}


def test_losses_are_those_of_transformers_heads() -> None:
    scores, labels = torch.randn(5, 2), torch.tensor([0, 1, 1, 0, 1])
    expected = torch.nn.CrossEntropyLoss()(scores, labels)
    torch.testing.assert_close(TWO.losses(scores, labels).mean(), expected)
    scores, targets = torch.randn(5, 1), torch.randn(5)
    torch.testing.assert_close(SCORES.losses(scores, targets).mean(), torch.nn.MSELoss()(scores.squeeze(), targets))


def test_sequences_are_what_the_tokenizer_makes_of_pairs(tokenizer: Any) -> None:
    examples = [
        LabelledText(("the bank of england", "a river"), 1),
        LabelledText(("rates fall again", "peter said"), 0),
    ]
    encoded = TWO.encode(examples, tokenizer, 8)
    plain = tokenizer(*(list(texts) for texts in zip(*(one.texts for one in examples), strict=True)),
                      truncation=True, max_length=8)  # fmt: skip
    batch = encoded.batch([1, 0])
    assert batch.input_ids.tolist() == plain["input_ids"][1] + plain["input_ids"][0]
    assert batch.token_types is not None
    assert batch.token_types.tolist() == plain["token_type_ids"][1] + plain["token_type_ids"][0]
    assert max(batch.lengths) <= 8
    assert batch.masked_positions.tolist() == [0, batch.lengths[0]] and batch.labels.tolist() == [0, 1]
    assert encode_texts([("a river",)], tokenizer, 8)["input_ids"] == [tokenizer("a river")["input_ids"]]


def test_single_texts_have_no_token_types(tokenizer: Any) -> None:
    encoded = SCORES.encode([LabelledText(("a river",), 2.5)], tokenizer, 16)
    assert encoded.token_types is None and encoded.labels.dtype == torch.float32 and encoded.labels.tolist() == [2.5]


@pytest.mark.parametrize("task", [TWO, SCORES])
def test_an_example_survives_its_row(task: Any) -> None:
    for texts in [("one",), ("one", "two")]:
        example = LabelledText(texts, 1)
        assert task.example(task.row(example), columns_of(task), "here") == example


def test_a_users_columns_are_read() -> None:
    row = {"premise": "rain", "hypothesis": "wet", "gold": "yes", "text": "not this"}
    columns = columns_of(TWO, ["premise", "hypothesis"], "gold")
    assert TWO.example(row, columns, "here") == LabelledText(("rain", "wet"), 1)
    assert columns_of(TWO) == Columns(("text",), "label")


@pytest.mark.parametrize("value", ["high", None, "nan", "inf", ""])
def test_a_score_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"^here: "):
        SCORES.example({"text": "a", "label": value}, SCORES.columns, "here")
