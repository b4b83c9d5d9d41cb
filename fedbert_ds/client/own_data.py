"""What an owner brings, text to mask or labelled examples: read before joining, then encoded."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedbert_ds.data.corpus import Article, Reading, identity_of, read_articles
from fedbert_ds.data.held_out import check_share, evaluation_batch, is_kept_apart, keep_apart
from fedbert_ds.data.labelled import LabelledStream, held_out_batch
from fedbert_ds.data.long_steps import telling
from fedbert_ds.data.masking import (
    Batch,
    BatchStream,
    Collected,
    Encoded,
    Sequences,
    SequenceStream,
    check_known,
    encoded_articles,
)
from fedbert_ds.data.table_files import Place
from fedbert_ds.data.text_files import Encodings
from fedbert_ds.data.token_cache import Summary, TokenCache, key_of
from fedbert_ds.data.token_files import StoredText, token_writer
from fedbert_ds.data.tokenizer import fingerprint
from fedbert_ds.errors import DataError, WireError
from fedbert_ds.tasks.examples import column
from fedbert_ds.tasks.registry import TASKS, task_of
from fedbert_ds.tasks.rows import read_rows
from fedbert_ds.tasks.task import columns_of
from fedbert_ds.wire.messages import ClientSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MASKED_LM = "masked_lm"
MUCH_TEXT = 50_000_000
"""Characters; a minute's tokenizing on one slow core."""


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
    def num_articles(self) -> int:
        """Articles, or examples."""

    @property
    def num_characters(self) -> int:
        """Of all text: how much of a window is this owner's."""

    @property
    def takes_long(self) -> bool:
        """Whether tokens are still to be made of so much text that no seat should wait for them."""

    @property
    def tokens_told(self) -> list[str]:
        """What tokens were made of it, a sentence each; after `encoded`."""

    def encoded(
        self, tokenizer: PreTrainedTokenizerFast, hf_config: Any, settings: ClientSettings, share: Share
    ) -> tuple[SequenceStream, Batch | None]:
        """What is trained on, and what evaluations read, if any."""


@dataclass
class OwnText:
    """Plain text, for masked words: counted before joining, read again to be tokenized.

    Articles are never in memory together. Tokens are, unless there is a cache for them.
    """

    sources: Sequence[str]
    text_column: str | None = None
    encodings: Encodings = field(default_factory=Encodings)
    cache: TokenCache | None = None
    _tokens_told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._identity = identity_of(self.sources) if self.cache else None
        # A text that nothing identifies gets a name that no later one has.
        self._key = key_of(self._identity or secrets.token_hex(), self.text_column, self.encodings.named)
        kept = self.cache.summary(self._key) if self.cache else None
        self._seen = kept or self._counted()
        self._is_kept = kept is not None

    @property
    def summary(self) -> list[str]:
        """See `OwnData`."""
        seen = self._seen
        files = f"{seen.files:,} file{'s' * (seen.files != 1)}, " if seen.files else ""
        numbers = f"{seen.articles:,} articles, {seen.characters:,} characters"
        return [f"{files}{numbers}, longest word {seen.longest_word:,}", *seen.remarks]

    @property
    def takes_long(self) -> bool:
        """See `OwnData`; tokens that are in no cache could not be made before."""
        return self.cache is not None and not self._is_kept and self._seen.characters > MUCH_TEXT

    @property
    def tokens_told(self) -> list[str]:
        """See `OwnData`."""
        return self._tokens_told

    @property
    def num_articles(self) -> int:
        """See `OwnData`."""
        return self._seen.articles

    @property
    def num_characters(self) -> int:
        """See `OwnData`."""
        return self._seen.characters

    def encoded(
        self, tokenizer: PreTrainedTokenizerFast, hf_config: Any, settings: ClientSettings, share: Share
    ) -> tuple[SequenceStream, Batch | None]:
        """See `OwnData`."""
        check_share(self._seen.articles, share.held_out)
        masking: dict[str, Any] = {
            "mask_probability": settings.sequences.mask_probability,
            "whole_word": settings.sequences.whole_word,
            "seed": settings.seed,
            "client": share.client,
        }
        text, kept = self._tokenized(tokenizer, settings.sequences.sequence_length, share)
        held_out = None
        if kept is not None:
            held_out = evaluation_batch(kept, tokenizer, max_tokens=share.evaluate_tokens, **masking)
            kept.close()
        unknown = check_known(text, tokenizer)
        self._tokens_told = [
            f"{text.num_tokens:,} tokens in {text.num_sequences:,} sequences to train on, {100 * unknown:.2f} % [UNK]"
        ]
        self._is_kept = self.cache is not None
        return BatchStream(text, tokenizer, **masking), held_out

    def _tokenized(
        self, tokenizer: PreTrainedTokenizerFast, length: int, share: Share
    ) -> tuple[Sequences, Sequences | None]:
        """What is trained on; what evaluations read, if there are any."""
        is_read = share.held_out > 0 and share.evaluate_tokens > 0
        if self.cache is None:
            trained_on, apart = Collected(), Collected()
            self._divide(tokenizer, length, share.held_out, trained_on.add, apart.add if is_read else _nowhere)
            return trained_on.text(), apart.text() if is_read else None
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        tokens = key_of(fingerprint(tokenizer), length, share.held_out)

        def write(folder: Path) -> None:
            with (
                token_writer(folder, TRAINED_ON, vocab_size) as ours,
                token_writer(folder, HELD_OUT, vocab_size) as out,
            ):
                self._divide(tokenizer, length, share.held_out, ours.add, out.add)
            if self._identity is not None and identity_of(self.sources) != self._identity:
                raise DataError(CHANGED)

        entry = self.cache.entry(self._key, tokens) or self.cache.make(self._key, tokens, self._seen, write)
        return StoredText(entry, TRAINED_ON, vocab_size), StoredText(entry, HELD_OUT, vocab_size) if is_read else None

    def _divide(
        self,
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        held_out: float,
        train: Callable[[Encoded], None],
        keep_apart: Callable[[Encoded], None],
    ) -> None:
        """Tokenize the text: each article goes to one of the two."""
        reading = self._reading()
        articles = telling(
            read_articles(self.sources, reading=reading),
            "tokenizing",
            _length,
            self._seen.characters,
        )
        for number, part in enumerate(encoded_articles(articles, tokenizer, length)):
            (keep_apart if is_kept_apart(number, held_out) else train)(part)
        if (reading.articles, reading.characters) != (self._seen.articles, self._seen.characters):
            raise DataError(CHANGED)

    def _counted(self) -> Summary:
        reading = self._reading()
        for _ in telling(read_articles(self.sources, reading=reading), "reading text", _length):
            pass
        self.encodings.found = reading.encodings.found
        return Summary(
            reading.files, reading.articles, reading.characters, reading.longest_word, tuple(reading.sentences())
        )

    def _reading(self) -> Reading:
        return Reading(self.text_column, Encodings(self.encodings.named, found=dict(self.encodings.found)))


TRAINED_ON, HELD_OUT = "trained-on", "held-out"
"""Names of the two texts of an entry of the cache."""
CHANGED = "the text changed while it was read; start this client again when nothing writes to it"


def _length(article: Article) -> int:
    return len(article.text)


def _nowhere(part: Encoded) -> None:
    """What nobody reads is not kept."""


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
    def takes_long(self) -> bool:
        """See `OwnData`."""
        return False

    @property
    def tokens_told(self) -> list[str]:
        """See `OwnData`."""
        return []

    @property
    def num_articles(self) -> int:
        """See `OwnData`."""
        return len(self.places)

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
    cache: Path | None = None,
) -> OwnData:
    """Read an owner's files for the task of that name; DataError for files without text.

    Plain text may be in one of `text_columns`, and of an `encoding`. Its tokens are kept in the
    folder `cache`; without one, in memory.
    """
    if task_name == MASKED_LM:
        column_of_text = text_columns[0] if text_columns else None
        kept = TokenCache(cache) if cache else None
        own: OwnText | OwnExamples = OwnText(sources, column_of_text, Encodings(encoding), kept)
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
