"""Labelled examples: a text or two with one label, or words with a label each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedbert_ds.errors import DataError


@dataclass(frozen=True)
class LabelledText:
    """One or two texts and their label: its number in the task's `labels`, or a score."""

    texts: tuple[str, ...]
    label: int | float | None
    """None in test sets."""

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(self.texts)


@dataclass(frozen=True)
class LabelledWords:
    """Words and the number of each one's label."""

    words: tuple[str, ...]
    labels: tuple[int, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(self.words)


Example = LabelledText | LabelledWords
Row = Mapping[str, Any]
"""A row of a user's file, by column."""


def column(row: Row, name: str, where: str) -> Any:
    """A row's value; DataError, one line, where the column is missing or empty."""
    if name not in row:
        raise DataError(
            f"{where}: no column {name!r} (columns: {', '.join(map(str, row))}); name yours in task.text and "
            "task.label, a client with --text-columns and --label-column"
        )
    if row[name] is None:
        raise DataError(f"{where}: column {name!r} is empty; fill it or leave the row out")
    return row[name]


def text_of(row: Row, name: str, where: str) -> str:
    """A row's text; DataError for another kind of value."""
    value = column(row, name, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {name!r} holds {type(value).__name__}, not text; name another")
    return value


def label_number(value: Any, labels: tuple[str, ...], where: str) -> int:
    """The number of a label, given as its word or, in files that know numbers, as its number.

    DataError for one outside the set.
    """
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    raise DataError(f"{where}: label {value!r} is none of the task's; use {', '.join(labels)}")
