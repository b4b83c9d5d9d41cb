"""A label or a score for each text or pair of texts, read at the first token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedbert_ds.data.labelled import LabelledSequences
from fedbert_ds.data.masking import EncodedText
from fedbert_ds.errors import DataError
from fedbert_ds.tasks.examples import LabelledText, Row, column, label_number, text_of
from fedbert_ds.tasks.task import Columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAIR = "text_pair"
"""Column of the second text, in the form that the tasks write."""


class _SequenceTask:
    """What both kinds have in common: texts, and where the head reads."""

    head = "ForSequenceClassification"
    reads_first_token = True
    columns = Columns(("text",), "label")

    def row(self, example: LabelledText) -> dict[str, Any]:
        """An example in the task's own columns; PAIR with a second text."""
        return dict(zip(("text", PAIR), example.texts, strict=False)) | {"label": example.label}

    def encode(
        self, examples: Sequence[LabelledText], tokenizer: PreTrainedTokenizerFast, sequence_length: int
    ) -> LabelledSequences:
        """A sequence for each example, its label at the first token; the longer text is cut."""
        rows = encode_texts([example.texts for example in examples], tokenizer, sequence_length)
        lengths = [len(ids) for ids in rows["input_ids"]]
        tokens = torch.tensor([token for ids in rows["input_ids"] for token in ids], dtype=torch.int32)
        offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        types = [kind for kinds in rows.get("token_type_ids", ()) for kind in kinds]
        return LabelledSequences(
            EncodedText(tokens, offsets, torch.ones(len(tokens), dtype=torch.bool)),
            positions=offsets[:-1],
            labels=torch.tensor([example.label for example in examples], dtype=self._label_dtype),
            token_types=torch.tensor(types, dtype=torch.int64) if any(types) else None,
        )

    _label_dtype = torch.int64

    @staticmethod
    def _texts(row: Row, columns: Columns, where: str) -> tuple[str, ...]:
        names = columns.text
        if names == _SequenceTask.columns.text and PAIR in row:
            names = (*names, PAIR)
        return tuple(text_of(row, name, where) for name in names)


@dataclass(frozen=True)
class SequenceClassification(_SequenceTask):
    """One of several labels; cross-entropy; accuracy, F1 and Matthews correlation."""

    labels: tuple[str, ...]
    name = "sequence_classification"

    @property
    def num_counts(self) -> int:
        """See `Task`."""
        return 3 * len(self.labels)

    @property
    def config_fields(self) -> dict[str, Any]:
        """See `Task`."""
        return {"problem_type": "single_label_classification", **label_fields(self.labels)}

    def example(self, row: Row, columns: Columns, where: str) -> LabelledText:
        """See `Task`."""
        label = label_number(column(row, columns.label, where), self.labels, where)
        return LabelledText(self._texts(row, columns, where), label)

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropies, nats."""
        return functional.cross_entropy(scores, labels, reduction="none")

    def counts(self, scores: Tensor, labels: Tensor, bounds: Sequence[int]) -> list[float]:
        """Of each label: examples that have and get it, that get it, that have it."""
        given = scores.argmax(1)
        of_each = (given[given == labels], given, labels)
        return [float(n) for part in of_each for n in torch.bincount(part, minlength=len(self.labels)).tolist()]

    def measures(self, counts: Sequence[float]) -> dict[str, float]:
        """`f1` is label 1's where there are two, else the mean over labels; Matthews correlation
        of several labels as Gorodkin (2004).
        """
        both, given, have = np.asarray(counts, dtype=np.float64).reshape(3, -1)
        total, correct = float(have.sum()), float(both.sum())
        of_each = [_ratio(2 * b, g + h) for b, g, h in zip(both, given, have, strict=True)]
        spread = (total**2 - float(given @ given)) * (total**2 - float(have @ have))
        return {
            "accuracy": _ratio(correct, total),
            "f1": of_each[1] if len(of_each) == 2 else float(np.mean(of_each)),
            "matthews": _ratio(correct * total - float(given @ have), math.sqrt(max(0.0, spread))),
        }


@dataclass(frozen=True)
class SequenceRegression(_SequenceTask):
    """A score; squared error; Pearson correlation."""

    name = "sequence_regression"
    labels: ClassVar[tuple[str, ...]] = ()
    num_counts = 6
    _label_dtype = torch.float32

    @property
    def config_fields(self) -> dict[str, Any]:
        """See `Task`."""
        return {"problem_type": "regression", "num_labels": 1}

    def example(self, row: Row, columns: Columns, where: str) -> LabelledText:
        """See `Task`."""
        value = column(row, columns.label, where)
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise DataError(f"{where}: label {value!r} is no number; name the column of scores in task.label")
        return LabelledText(self._texts(row, columns, where), score)

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Squared errors."""
        return functional.mse_loss(scores.squeeze(1), labels.to(scores.dtype), reduction="none")

    def counts(self, scores: Tensor, labels: Tensor, bounds: Sequence[int]) -> list[float]:
        """Number, sums, sums of squares and of products."""
        given, have = scores.squeeze(1).double(), labels.double()
        sums = (given, have, given * given, have * have, given * have)
        return [float(len(labels)), *(float(values.sum()) for values in sums)]

    def measures(self, counts: Sequence[float]) -> dict[str, float]:
        """`pearson`, and the root of the mean squared error as `rmse`."""
        n, x, y, xx, yy, xy = counts
        spread = (n * xx - x * x) * (n * yy - y * y)
        return {
            "pearson": _ratio(n * xy - x * y, math.sqrt(max(0.0, spread))),
            "rmse": math.sqrt(max(0.0, _ratio(xx - 2 * xy + yy, n))),
        }


def encode_texts(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerFast, sequence_length: int
) -> dict[str, list[list[int]]]:
    """What the tokenizer makes of texts or pairs, by name: `input_ids` and what else it gives, a
    list for each; cut to `sequence_length` tokens, the longer text of two first.
    """
    columns = [list(one) for one in zip(*texts, strict=True)]
    return dict(tokenizer(*columns, truncation=True, max_length=sequence_length))


def label_fields(labels: Sequence[str]) -> dict[str, Any]:
    """Fields of a transformers config with a classifier's labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {word: number for number, word in enumerate(labels)},
    }


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
