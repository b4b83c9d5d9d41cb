"""Examples hold what a row says, and a row that says nothing is refused in one line."""

from __future__ import annotations

import pytest

from fedbert_ds.errors import DataError
from fedbert_ds.tasks.examples import LabelledText, LabelledWords, column, label_number, text_of

LABELS = ("no", "yes")


def test_text_is_all_of_an_example() -> None:
    assert LabelledText(("one", "two"), 1).text == "one\ntwo"
    assert LabelledWords(("a", "b"), (0, 1)).text == "a b"


@pytest.mark.parametrize(("value", "number"), [("no", 0), ("yes", 1), (0, 0), (1, 1)])
def test_a_label_is_a_word_or_a_number(value: object, number: int) -> None:
    assert label_number(value, LABELS, "here") == number


@pytest.mark.parametrize("value", ["maybe", "1", 2, -1, True, 1.0, None, ""])
def test_another_label_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"^here: label .* is none of the task's; use no, yes$"):
        label_number(value, LABELS, "here")


def test_a_word_wins_where_labels_are_digits() -> None:
    assert label_number("1", ("1", "0"), "here") == 0
    assert label_number(1, ("1", "0"), "here") == 1


def test_columns_that_are_not_there_are_named() -> None:
    with pytest.raises(DataError, match=r"^here: no column 'text' \(columns: a, b\); name yours in task.text"):
        column({"a": 1, "b": 2}, "text", "here")
    with pytest.raises(DataError, match="column 'a' is empty"):
        column({"a": None}, "a", "here")
    with pytest.raises(DataError, match="column 'a' holds int, not text"):
        text_of({"a": 3}, "a", "here")
    assert text_of({"a": "b"}, "a", "here") == "b"
