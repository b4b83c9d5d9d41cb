"""A label for each word, named entities above all, read at the word's first piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from fedbert_ds.data.labelled import LabelledSequences
from fedbert_ds.data.masking import EncodedText, sequence_ends
from fedbert_ds.data.plain_tokens import plain_backend
from fedbert_ds.errors import DataError
from fedbert_ds.tasks.examples import LabelledWords, Row, column, label_number
from fedbert_ds.tasks.rows import TAGS, TOKENS
from fedbert_ds.tasks.sequence_tasks import label_fields
from fedbert_ds.tasks.task import Columns

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Entity = tuple[str, int, int]
"""Kind, first word, word behind the last."""


@dataclass(frozen=True)
class TokenClassification:
    """One of several labels for each word; cross-entropy; F1 of whole entities.

    Labels `B-KIND`, `I-KIND` and `O` mark entities, as in CoNLL 2003; with others every word that
    is not `O` is an entity of its own.
    """

    labels: tuple[str, ...]
    name = "token_classification"
    head = "ForTokenClassification"
    reads_first_token = False
    num_counts = 5
    columns = Columns((TOKENS,), TAGS)

    @property
    def config_fields(self) -> dict[str, Any]:
        """See `Task`; token classification has no `problem_type`."""
        return {"problem_type": None, **label_fields(self.labels)}

    def example(self, row: Row, columns: Columns, where: str) -> LabelledWords:
        """See `Task`."""
        words, tags = (column(row, name, where) for name in (columns.text[0], columns.label))
        for name, values in ((columns.text[0], words), (columns.label, tags)):
            if not isinstance(values, list):
                raise DataError(f"{where}: column {name!r} is no list; words and labels come as lists, or as .conll")
        if len(words) != len(tags) or not words:
            raise DataError(f"{where}: {len(words)} words and {len(tags)} labels; each word has one")
        if odd := [word for word in words if not isinstance(word, str) or not word.strip()]:
            raise DataError(f"{where}: {odd[0]!r} is no word; leave it out, with its label")
        return LabelledWords(tuple(words), tuple(label_number(tag, self.labels, where) for tag in tags))

    def row(self, example: LabelledWords) -> dict[str, Any]:
        """An example in the task's own columns."""
        return {TOKENS: list(example.words), TAGS: list(example.labels)}

    def encode(
        self, examples: Sequence[LabelledWords], tokenizer: PreTrainedTokenizerFast, sequence_length: int
    ) -> LabelledSequences:
        """Each example is one sequence, or several where it is longer: then it is divided between
        words, and every label stays. A word without any piece loses its label.
        """
        first, last = sequence_ends(tokenizer)
        room, backend = sequence_length - 2, plain_backend(tokenizer)
        tokens: list[int] = []
        offsets, positions, labels = [0], list[int](), list[int]()
        for example in examples:
            for sentence in _fitting(_pieces(example, backend, room), room):
                tokens += first.tolist()
                for ids, label in sentence:
                    positions.append(len(tokens))
                    labels.append(label)
                    tokens += ids
                tokens += last.tolist()
                offsets.append(len(tokens))
        if not positions:
            raise DataError("no word of these examples has a piece in the vocabulary; name another tokenizer.path")
        text = EncodedText(
            torch.tensor(tokens, dtype=torch.int32),
            torch.tensor(offsets, dtype=torch.int64),
            torch.ones(len(tokens), dtype=torch.bool),
        )
        return LabelledSequences(text, torch.tensor(positions), torch.tensor(labels))

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropies, nats."""
        return functional.cross_entropy(scores, labels, reduction="none")

    def counts(self, scores: Tensor, labels: Tensor, bounds: Sequence[int]) -> list[float]:
        """Entities found, given and there; words labelled right, and all words."""
        given = scores.argmax(1)
        found = told = there = 0
        for start, end in pairwise(bounds):
            ours, theirs = (
                set(entities([self.labels[number] for number in numbers[start:end].tolist()]))
                for numbers in (given, labels)
            )
            found, told, there = found + len(ours & theirs), told + len(ours), there + len(theirs)
        return [float(n) for n in (found, told, there, (given == labels).sum(), len(labels))]

    def measures(self, counts: Sequence[float]) -> dict[str, float]:
        """`f1`, `precision` and `recall` of whole entities; `accuracy` of words."""
        found, told, there, right, words = counts
        return {
            "f1": 2 * found / (told + there) if told + there else 0.0,
            "precision": found / told if told else 0.0,
            "recall": found / there if there else 0.0,
            "accuracy": right / words if words else 0.0,
        }


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """Entities of a sentence, as conlleval (CoNLL 2000) finds them: `B-` begins one, `I-` of
    another kind than the word before begins one, too.
    """
    start, kind = 0, ""
    for place, tag in enumerate((*tags, "O")):
        prefix, dash, rest = tag.partition("-")
        marked = bool(dash) and prefix in ("B", "I")
        here = "" if tag == "O" else rest if marked else tag
        goes_on = here == kind and marked and prefix == "I"
        if not goes_on:
            if kind:
                yield kind, start, place
            start, kind = place, here


def _pieces(example: LabelledWords, backend: Tokenizer, room: int) -> Iterator[tuple[list[int], int]]:
    """Each word's ids, at most `room`, and its label."""
    # A blank before each: byte-level vocabularies have other pieces at the beginning of a text.
    encodings = backend.encode_batch([f" {word}" for word in example.words], add_special_tokens=False)
    for encoding, label in zip(encodings, example.labels, strict=True):
        if encoding.ids:
            yield encoding.ids[:room], label


def _fitting(words: Iterator[tuple[list[int], int]], room: int) -> Iterator[list[tuple[list[int], int]]]:
    """Words in order, divided so that each part has at most `room` tokens."""
    part: list[tuple[list[int], int]] = []
    used = 0
    for word in words:
        if part and used + len(word[0]) > room:
            yield part
            part, used = [], 0
        part.append(word)
        used += len(word[0])
    if part:
        yield part
