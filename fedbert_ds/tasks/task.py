"""What is learned from owners' own labels: a task is its examples, head, loss and measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fedbert_ds.data.labelled import LabelledSequences
from fedbert_ds.tasks.examples import Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Columns:
    """Where a user's files have text and label."""

    text: tuple[str, ...]
    label: str


class Task(Protocol):
    """One kind of label. A new kind is a class like these and a line in `tasks.registry`.

    Nothing here knows of the cut: a client asks the body for the hidden states of the labelled
    positions, as it does for masked ones.
    """

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels' words, by number; none where labels are scores."""

    @property
    def name(self) -> str:
        """As `task.name` in the run file."""

    @property
    def columns(self) -> Columns:
        """Of files in the form that `row` writes."""

    @property
    def head(self) -> str:
        """Ending of the classes of transformers that have its head: `ForTokenClassification`."""

    @property
    def reads_first_token(self) -> bool:
        """Labels are of whole sequences, and the head reads their first token."""

    @property
    def num_counts(self) -> int:
        """Length of `counts`."""

    @property
    def config_fields(self) -> dict[str, Any]:
        """Fields of a transformers config that give the head its width and its labels' names."""

    def example(self, row: Row, columns: Columns, where: str) -> Example:
        """An example of a user's row; DataError, one line, for one that is none."""

    def row(self, example: Any) -> dict[str, Any]:
        """The reverse, in the task's own `columns`."""

    def encode(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerFast, sequence_length: int
    ) -> LabelledSequences:
        """Sequences of at most `sequence_length` tokens, with a label at some positions."""

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """[m] losses of outputs [m, K] beside labels [m]; training minimizes their mean."""

    def counts(self, scores: Tensor, labels: Tensor, bounds: Sequence[int]) -> list[float]:
        """Sums that `measures` takes; those of several texts, owners' too, may be added up.

        `bounds` [n + 1] divide the m positions into sequences.
        """

    def measures(self, counts: Sequence[float]) -> dict[str, float]:
        """The task's measures, by name; 0 where one is undefined."""


def columns_of(task: Task, text: Sequence[str] = (), label: str | None = None) -> Columns:
    """The columns that a user names, else the task's own."""
    return Columns(tuple(text) or task.columns.text, label or task.columns.label)
