"""What an owner brings, text to mask or labelled examples: read before joining, then encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fedbert_ds.data.corpus import Article, Reading, read_articles
from fedbert_ds.data.held_out import evaluation_batch, keep_apart
from fedbert_ds.data.labelled import LabelledStream, held_out_batch
from fedbert_ds.data.masking import Batch, BatchStream, SequenceStream, check_known, encode
from fedbert_ds.data.table_files import Place
from fedbert_ds.data.text_files import Encodings
from fedbert_ds.errors import DataError, WireError
from fedbert_ds.tasks.examples import column
from fedbert_ds.tasks.registry import TASKS, task_of
from fedbert_ds.tasks.rows import read_rows
from fedbert_ds.tasks.task import columns_of
from fedbert_ds.wire.messages import ClientSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MASKED_LM = "masked_lm"


@dataclass(frozen=True)
class Share:
    """How the run divides an owner's data."""

    client: str
    held_out: float
    """Share that is kept out of training."""
    evaluate_tokens: int
    """Most of it in an evaluation; 0 where the run has none."""


class OwnData(Protocol):
    """An owner's files, read."""

    @property
    def summary(self) -> list[str]:
        """What was read and what was left out, a sentence each."""

    @property
    def num_characters(self) -> int:
        """Of all text: how much of a window is this owner's."""

    def encoded(
        self, tokenizer: PreTrainedTokenizerFast, hf_config: Any, settings: ClientSettings, share: Share
    ) -> tuple[SequenceStream, Batch | None]:
        """What is trained on, and what evaluations read, if any."""


@dataclass(frozen=True)
class OwnText:
    """Plain text, for masked words."""

    articles: Sequence[Article]
    remarks: Sequence[str] = ()
    """What became of files and rows that were not read."""

    @property
    def summary(self) -> list[str]:
        """See `OwnData`."""
        return [f"{len(self.articles):,} articles, {self.num_characters:,} characters", *self.remarks]

    @property
    def num_characters(self) -> int:
        """See `OwnData`."""
        return sum(len(article.text) for article in self.articles)

    def encoded(
        self, tokenizer: PreTrainedTokenizerFast, hf_config: Any, settings: ClientSettings, share: Share
    ) -> tuple[SequenceStream, Batch | None]:
        """See `OwnData`."""
        trained_on, kept = keep_apart(self.articles, share.held_out)
        length = settings.sequences.sequence_length
        masking: dict[str, Any] = {
            "mask_probability": settings.sequences.mask_probability,
            "whole_word": settings.sequences.whole_word,
            "seed": settings.seed,
            "client": share.client,
        }
        held_out = None
        if kept and share.evaluate_tokens:
            apart = encode(kept, tokenizer, length)
            held_out = evaluation_batch(apart, tokenizer, max_tokens=share.evaluate_tokens, **masking)
        text = encode(trained_on, tokenizer, length)
        check_known(text, tokenizer)
        return BatchStream(text, tokenizer, **masking), held_out


@dataclass(frozen=True)
class OwnExamples:
    """Rows with labels. Which labels there are, the run's model says."""

    places: Sequence[Place]
    text_columns: Sequence[str] = ()
    label_column: str | None = None

    @property
    def summary(self) -> list[str]:
        """See `OwnData`."""
        return [f"{len(self.places):,} labelled examples"]

    @property
    def num_characters(self) -> int:
        """See `OwnData`; of all columns, as which of them are text is not known yet."""
        return sum(_characters(value) for _, row in self.places for value in row.values())

    def encoded(
        self, tokenizer: PreTrainedTokenizerFast, hf_config: Any, settings: ClientSettings, share: Share
    ) -> tuple[SequenceStream, Batch | None]:
        """See `OwnData`. DataError for a row that the task cannot read."""
        task = task_of(hf_config)
        if task is None:
            raise WireError("the server's model has no head for labels; install the same fedbert-ds on both")
        columns = columns_of(task, self.text_columns, self.label_column)
        trained_on, kept = keep_apart([task.example(row, columns, where) for where, row in self.places], share.held_out)
        length = settings.sequences.sequence_length
        held_out = None
        if kept and share.evaluate_tokens:
            held_out = held_out_batch(task.encode(kept, tokenizer, length), share.evaluate_tokens)
        sequences = task.encode(trained_on, tokenizer, length)
        return LabelledStream(sequences, seed=settings.seed, client=share.client), held_out


def read_own_data(
    sources: Sequence[str],
    task_name: str,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    encoding: str | None = None,
) -> OwnData:
    """Read an owner's files for the task of that name; DataError for files without text.

    Plain text may be in one of `text_columns`, and of an `encoding`.
    """
    if task_name == MASKED_LM:
        reading = Reading(text_columns[0] if text_columns else None, Encodings(encoding))
        own: OwnText | OwnExamples = OwnText(list(read_articles(sources, reading=reading)), reading.sentences())
    else:
        # Labels are known after joining only; a missing column is told before.
        columns = columns_of(TASKS[task_name](()), text_columns, label_column)
        places = list(read_rows(sources))
        for where, row in places:
            for name in (*columns.text, columns.label):
                column(row, name, where)
        own = OwnExamples(places, text_columns, label_column)
    if not own.num_characters:
        raise DataError(f"{', '.join(sources)}: no text; name files with text in --data")
    return own


def _characters(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 0
