"""Articles to packed masked-LM batches: encoded once, shuffled and masked by seeds and a cursor."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fedbert_ds.data.corpus import Article
from fedbert_ds.data.plain_tokens import divides_words, plain_backend, words_begin
from fedbert_ds.errors import DataError, warn
from fedbert_ds.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MASKED, _RANDOM = 0.8, 0.1
MUCH_UNKNOWN = 0.01
"""Share of [UNK] that is worth a warning."""
_CHARACTERS_AT_ONCE = 1 << 18
"""Text that is tokenized at once, unless one article is longer: a token in the making takes a
hundred times the memory of its id.
"""
_LONGEST_PART = 1 << 20
"""Characters of an article that are tokenized at once."""
_BLOCK_TOKENS = 1 << 20


class Arrays(NamedTuple):
    """A text's tokens [N] integers, word starts [N] bool and offsets [S + 1] int64."""

    tokens: np.ndarray
    word_starts: np.ndarray
    offsets: np.ndarray


class Sequences(ABC):
    """Sequences one after another, unpadded, in memory or on disk; each is [CLS] ... [SEP]."""

    @property
    @abstractmethod
    def num_sequences(self) -> int:
        """S."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """N, special tokens included."""

    @abstractmethod
    def arrays(self) -> Arrays:
        """All of it, to take parts of. Of a text on disk it is a map of files: what was read of a
        map is memory of this process until the map is dropped, so keep it no longer than needed.
        """

    @abstractmethod
    def put_by(self, numbers: np.ndarray) -> Callable[[], np.ndarray]:
        """Keep an array of a number a sequence where the text is kept, until the next is put by;
        returns what gives it back, to be called for each use (see `arrays`).
        """

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds open; it is not read after that."""

    def pieces(self, sequences: Iterable[int]) -> list[slice]:
        """Where these sequences stand among the tokens."""
        offsets = self.arrays().offsets
        return [slice(int(offsets[index]), int(offsets[index + 1])) for index in sequences]

    def spread(self, max_tokens: int) -> list[int]:
        """Numbers of sequences, spread evenly over the text, that together have about `max_tokens`
        tokens at most; at least one.
        """
        count = max(1, min(self.num_sequences, self.num_sequences * max_tokens // self.num_tokens))
        return np.unique(np.linspace(0, self.num_sequences - 1, count).round().astype(np.int64)).tolist()

    def take(self, pieces: Sequence[slice]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [T] and word starts [T] of these pieces, copied one after another."""
        tokens, word_starts, _ = self.arrays()
        return np.concatenate([tokens[one] for one in pieces]), np.concatenate([word_starts[one] for one in pieces])

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All tokens and word starts, in order and in parts."""
        for begin in range(0, self.num_tokens, _BLOCK_TOKENS):
            yield self.take([slice(begin, min(begin + _BLOCK_TOKENS, self.num_tokens))])

    def count(self, token: int) -> int:
        """How often a token occurs."""
        return sum(int(np.count_nonzero(tokens == token)) for tokens, _ in self.blocks())

    def digest(self, num_tokens: int) -> str:
        """SHA-256 of the first `num_tokens` tokens: equal for equal text, wherever it is kept."""
        digest, left = hashlib.sha256(), num_tokens
        for tokens, _ in self.blocks():
            digest.update(tokens[:left].astype("<i4").tobytes())
            left -= len(tokens)
            if left <= 0:
                break
        return digest.hexdigest()


@dataclass(frozen=True)
class EncodedText(Sequences):
    """A text in memory."""

    tokens: Tensor
    """[N] int32: token ids of all sequences."""
    offsets: Tensor
    """[S + 1] int64: sequence i is tokens[offsets[i]:offsets[i + 1]]; both its ends are special."""
    word_starts: Tensor
    """[N] bool: true where a word begins; special tokens are words of their own."""

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """N, special tokens included."""
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """[S] int64: tokens of each sequence, special tokens included."""
        return self.offsets.diff()

    def arrays(self) -> Arrays:
        """See `Sequences`."""
        return Arrays(self.tokens.numpy(), self.word_starts.numpy(), self.offsets.numpy())

    def put_by(self, numbers: np.ndarray) -> Callable[[], np.ndarray]:
        """See `Sequences`."""
        return lambda: numbers

    def close(self) -> None:
        """Nothing is open."""

    def token_counts(self, vocab_size: int) -> Tensor:
        """[vocab_size] int64: occurrences of each token; the added [CLS] and [SEP] do not count."""
        counts = torch.bincount(self.tokens, minlength=vocab_size)
        for ends in (self.offsets[:-1], self.offsets[1:] - 1):
            counts -= torch.bincount(self.tokens[ends], minlength=vocab_size)
        return counts


@dataclass(frozen=True)
class Batch:
    """Packed sequences with what is to be predicted: masked tokens, or labels of the owner's."""

    input_ids: Tensor
    """[T] int64: token ids after masking."""
    lengths: list[int]
    """Tokens of each sequence, in order; their sum is T."""
    masked_positions: Tensor
    """[m] int64, ascending: positions to predict; m may be 0 for a very short text."""
    labels: Tensor
    """[m]: int64, the original ids there or labels' numbers, or float32, scores."""
    token_types: Tensor | None = None
    """[T] int64: 1 in the second text of a pair. None: no pairs."""


def encode(articles: Iterable[Article], tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> EncodedText:
    """Tokenize articles and cut each into sequences of at most `sequence_length` tokens.

    [CLS] and [SEP] are among them. A sequence never holds text of two articles, and every token of
    the text is in exactly one sequence. Text that looks like a special token ("[MASK]") is text,
    except for special tokens that were added for the text itself ("[NAME]").

    DataError for a sequence_length below 3, for a tokenizer without special tokens for both ends,
    and for articles without any token.
    """
    collected = Collected()
    for part in encoded_articles(articles, tokenizer, sequence_length):
        collected.add(part)
    return collected.text()


class Encoded(NamedTuple):
    """The sequences of one article: tokens [n] int32, word starts [n] bool, lengths [s]."""

    tokens: np.ndarray
    word_starts: np.ndarray
    lengths: list[int]


@dataclass
class Collected:
    """Articles' sequences, gathered into a text in memory."""

    parts: list[Encoded] = field(default_factory=list)

    def add(self, part: Encoded) -> None:
        """Put an article's sequences behind the others."""
        self.parts.append(part)

    def text(self) -> EncodedText:
        """All of them; DataError if there is no token."""
        lengths = [length for part in self.parts for length in part.lengths]
        if not lengths:
            raise DataError(NO_TOKEN)
        return EncodedText(
            tokens=torch.from_numpy(np.concatenate([part.tokens for part in self.parts])),
            offsets=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64)),
            word_starts=torch.from_numpy(np.concatenate([part.word_starts for part in self.parts])),
        )


NO_TOKEN = "the text of this shard is empty: no token in it; give data.source some text"


def encoded_articles(
    articles: Iterable[Article], tokenizer: PreTrainedTokenizerFast, sequence_length: int
) -> Iterator[Encoded]:
    """The sequences of each article, as `encode` makes them, one article after the other.

    DataError as `encode`, but for articles without any token.
    """
    if sequence_length < 3:
        raise DataError(f"data.sequence_length {sequence_length} has no room for text; use 3 or more")
    first, last = sequence_ends(tokenizer)
    room = sequence_length - 2
    for ids, word_starts in _token_arrays(articles, tokenizer):
        tokens, starts, lengths = [ids[:0]], [word_starts[:0]], list[int]()
        for begin in range(0, len(ids), room):
            piece, piece_starts = ids[begin : begin + room], word_starts[begin : begin + room].copy()
            piece_starts[0] = True
            tokens += [first, piece, last]
            starts += [_TRUE, piece_starts, _TRUE]
            lengths.append(len(piece) + 2)
        yield Encoded(np.concatenate(tokens), np.concatenate(starts), lengths)


def check_known(text: Sequences, tokenizer: PreTrainedTokenizerFast) -> float:
    """The share of a text's tokens that are [UNK].

    DataError where the tokenizer knows no word of it, and a warning where it misses many.
    """
    if tokenizer.unk_token_id is None:
        return 0.0
    unknown = text.count(tokenizer.unk_token_id)
    tokens = text.num_tokens - 2 * text.num_sequences
    if unknown == tokens:
        raise DataError(
            "the tokenizer knows no word of this text, all of it is [UNK]; name another in tokenizer.path, or set "
            "tokenizer.kind: byte_bpe"
        )
    if unknown > MUCH_UNKNOWN * tokens:
        warn(
            f"{100 * unknown / tokens:.1f} % of the text's tokens are [UNK], which the tokenizer does not know and "
            "nothing is learned of; another tokenizer.path or tokenizer.kind: byte_bpe reads them"
        )
    return unknown / tokens


class Masker:
    """Chooses tokens to predict and hides them: 80 % become [MASK], 10 % a random token, 10 % stay.

    Equal in distribution to transformers' DataCollatorForLanguageModeling. With `whole_word`, each
    word is chosen with `mask_probability`, with all its tokens; the 80/10/10 is then drawn for each
    token, as BERT's authors did (transformers' collator turns all of them into [MASK]).

    DataError for a tokenizer without a mask token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, mask_probability: float, whole_word: bool = False
    ) -> None:
        check_mask(tokenizer)
        self.mask_probability = mask_probability
        self.whole_word = whole_word
        self._mask_id: int = tokenizer.mask_token_id
        self._num_tokens = len(tokenizer)
        self._special_ids = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)

    def mask(
        self, tokens: np.ndarray, word_starts: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mask tokens [T] (word_starts [T] bool).

        Returns input_ids [T], positions [m] ascending and labels [m], all int64.
        """
        if self.whole_word:
            chosen_words = random.random(int(word_starts.sum())) < self.mask_probability
            chosen = chosen_words[np.cumsum(word_starts) - 1]
        else:
            chosen = random.random(len(tokens)) < self.mask_probability
        positions = np.flatnonzero(chosen & ~np.isin(tokens, self._special_ids)).astype(np.int64)
        labels = tokens[positions].astype(np.int64)
        fate = random.random(len(positions))
        random_tokens = random.integers(self._num_tokens, size=len(positions))
        hidden = np.where(fate < _MASKED, self._mask_id, np.where(fate < _MASKED + _RANDOM, random_tokens, labels))
        input_ids = tokens.astype(np.int64)
        input_ids[positions] = hidden
        return input_ids, positions, labels

    def mask_pieces(
        self, text: Sequences, pieces: Sequence[slice], random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `mask` of the whole text gives for these pieces of it, in the text's order, without
        the whole text in memory. Positions are those in the pieces, one after another.
        """
        starts = np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])
        found, ordinals, labels = [], [], []
        begin = masked = 0
        carried = np.zeros(1, dtype=bool)  # whether the word that reaches into a block is chosen
        for tokens, word_starts in text.blocks():
            if self.whole_word:
                drawn = random.random(int(word_starts.sum())) < self.mask_probability
                of_words = np.concatenate([carried, drawn])
                chosen = of_words[np.cumsum(word_starts)]
                carried = of_words[-1:]
            else:
                chosen = random.random(len(tokens)) < self.mask_probability
            positions = np.flatnonzero(chosen & ~np.isin(tokens, self._special_ids))
            places = np.searchsorted(starts, positions + begin)
            ours = np.flatnonzero(
                (places < len(starts)) & (starts[np.minimum(places, len(starts) - 1)] == positions + begin)
            )
            found.append(places[ours])
            ordinals.append(masked + ours)
            labels.append(tokens[positions[ours]].astype(np.int64))
            begin += len(tokens)
            masked += len(positions)
        here, wanted, originals = np.concatenate(found), np.concatenate(ordinals), np.concatenate(labels)
        fate = _some_of(random.random, masked, wanted)
        random_tokens = _some_of(lambda size: random.integers(self._num_tokens, size=size), masked, wanted)
        hidden = np.where(fate < _MASKED, self._mask_id, np.where(fate < _MASKED + _RANDOM, random_tokens, originals))
        input_ids = text.take(pieces)[0].astype(np.int64)
        input_ids[here] = hidden
        return input_ids, here.astype(np.int64), originals


def _some_of(draw: Callable[[int], np.ndarray], total: int, wanted: np.ndarray) -> np.ndarray:
    """Of `total` draws those that are wanted (ascending numbers), without all in memory."""
    drawn = [np.empty(0)]
    for begin in range(0, total, _BLOCK_TOKENS):
        size = min(_BLOCK_TOKENS, total - begin)
        values = draw(size)
        drawn.append(values[wanted[np.searchsorted(wanted, begin) : np.searchsorted(wanted, begin + size)] - begin])
    return np.concatenate(drawn)


class Stream(Protocol):
    """What a client's training takes text from."""

    def next_batch(self, window: int, max_tokens: int) -> Batch:
        """The next sequences, for `window`, of about `max_tokens` together."""

    def state_dict(self) -> dict[str, int]:
        """The cursor."""

    def load_state_dict(self, state: Mapping[str, int] | None) -> None:
        """Go on from a cursor, or from the beginning."""


class SequenceStream(ABC):
    """An endless stream of batches over one client's sequences, shuffled anew every epoch.

    The cursor and the epoch's shuffle (seed, client, epoch) decide which sequences come next.
    Nothing else is remembered: two integers resume a stream, and the same seeds give bit-identical
    batches.
    """

    def __init__(self, text: Sequences, *, seed: int, client: int | str) -> None:
        if text.num_sequences == 0:
            raise DataError("the text of this shard is empty: no sequence in it; give data.source some text")
        self.text = text
        self._seed, self._client = seed, client
        self._epoch, self._position = 0, 0
        self._order = self._shuffled(0, text.num_sequences)

    @abstractmethod
    def batch_of(self, sequences: Sequence[int], window: int) -> Batch:
        """These sequences, packed in this order, with what is to be predicted in `window`."""

    def next_batch(self, window: int, max_tokens: int) -> Batch:
        """The next sequences of the shuffle that together fit `max_tokens`, for `window`.

        One sequence is taken even if it is longer than `max_tokens`. A new epoch begins inside a
        batch where the text ends, so a text shorter than `max_tokens` is repeated.
        """
        offsets, order = self.text.arrays().offsets, self._order()
        sequences: list[int] = []
        room = max_tokens
        while True:
            if self._position == len(order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffled(self._epoch, self.text.num_sequences)
                order = self._order()
            sequence = int(order[self._position])
            room -= int(offsets[sequence + 1] - offsets[sequence])
            if room < 0 and sequences:
                break
            sequences.append(sequence)
            self._position += 1
        return self.batch_of(sequences, window)

    def state_dict(self) -> dict[str, int]:
        """The cursor, and the number of sequences of its epoch."""
        return {"epoch": self._epoch, "position": self._position, "sequences": len(self._order())}

    def load_state_dict(self, state: Mapping[str, int] | None) -> None:
        """Continue from a `state_dict`, or from the beginning; DataError if the text has shrunk.

        Text that has been added behind the old one joins in the next epoch.
        """
        state = state or {"epoch": 0, "position": 0, "sequences": self.text.num_sequences}
        if state["sequences"] > self.text.num_sequences:
            raise DataError(
                f"the shard has {self.text.num_sequences} sequences, but had {state['sequences']} before in this run; "
                "go on with the same text, or more behind it, and the same tokenizer"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled(self._epoch, state["sequences"])

    def _shuffled(self, epoch: int, sequences: int) -> Callable[[], np.ndarray]:
        # The numbers of `permutation`, in half its memory.
        order = np.arange(sequences, dtype=np.int32 if sequences < 2**31 else np.int64)
        generator("shuffle", self._seed, self._client, epoch).shuffle(order)
        return self.text.put_by(order)


class BatchStream(SequenceStream):
    """A stream that masks: (seed, client, window) decides how a window's sequences are masked.

    A text that is repeated within a window or later is masked anew each time.
    """

    def __init__(
        self,
        text: Sequences,
        tokenizer: PreTrainedTokenizerFast,
        *,
        mask_probability: float,
        whole_word: bool,
        seed: int,
        client: int | str,
    ) -> None:
        super().__init__(text, seed=seed, client=client)
        self._masker = Masker(tokenizer, mask_probability=mask_probability, whole_word=whole_word)

    def batch_of(self, sequences: Sequence[int], window: int) -> Batch:
        """These sequences, masked for `window`."""
        pieces = self.text.pieces(sequences)
        random = generator("mask", self._seed, self._client, window)
        input_ids, positions, labels = self._masker.mask(*self.text.take(pieces), random)
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            lengths=[piece.stop - piece.start for piece in pieces],
            masked_positions=torch.from_numpy(positions),
            labels=torch.from_numpy(labels),
        )


_TRUE = np.ones(1, dtype=bool)


def check_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    """DataError for a tokenizer without a mask token."""
    if tokenizer.mask_token_id is None:
        raise DataError("this tokenizer has no mask token; name one of a masked LM in tokenizer.path")


def sequence_ends(tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """The ids that begin and end a sequence, [1] int32 each; DataError for a tokenizer without."""
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if first is None or last is None:
        raise DataError("this tokenizer has no [CLS] or [SEP] token; name a BERT-like tokenizer in tokenizer.path")
    return np.array([first], dtype=np.int32), np.array([last], dtype=np.int32)


def _token_arrays(
    articles: Iterable[Article], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids [n] int32, word_starts [n] bool) of each article, without special tokens."""
    backend = plain_backend(tokenizer)
    has_words = divides_words(backend)
    # An article's last part ends it; the parts before are kept until then.
    parts = ((part, is_last) for article in articles for part, is_last in parts_of(article.text))
    before: list[tuple[np.ndarray, np.ndarray]] = []
    for some in _some_at_once(parts):
        for encoding, (text, is_last) in zip(
            backend.encode_batch([text for text, _ in some], add_special_tokens=False), some, strict=True
        ):
            ids = np.array(encoding.ids, dtype=np.int32)
            word_starts = words_begin(encoding, None if has_words else text)
            before.append((ids, word_starts))
            if is_last:
                yield np.concatenate([part[0] for part in before]), np.concatenate([part[1] for part in before])
                before = []


def parts_of(text: str, longest: int = _LONGEST_PART) -> Iterator[tuple[str, bool]]:
    """A text in parts of at most `longest` characters, each with whether it is the last.

    A part begins with a space between two letters or digits of ASCII, where every tokenizer begins
    a word, so that the parts together have the tokens of the whole. Where the second half of a part
    has none it ends at its last white space, or at its length.
    """
    begin = 0
    while len(text) - begin > longest:
        window = text[begin : begin + longest]
        spaces = list(_PLAIN_SPACE.finditer(window, longest // 2)) or list(_SPACE.finditer(window, longest // 2))
        end = begin + (spaces[-1].start() if spaces else longest)
        yield text[begin:end], False
        begin = end
    yield text[begin:], True


_PLAIN_SPACE = re.compile("(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])")
_SPACE = re.compile(r"(?<=\S)\s")


def _some_at_once(parts: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    some: list[tuple[str, bool]] = []
    characters = 0
    for part in parts:
        if some and characters + len(part[0]) > _CHARACTERS_AT_ONCE:
            yield some
            some, characters = [], 0
        some.append(part)
        characters += len(part[0])
    if some:
        yield some
