"""A text in files is the text in memory: to the last token, for every reader of it."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.data import masking
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.held_out import evaluation_batch
from fedbert_ds.data.masking import BatchStream, Encoded, EncodedText, Masker, encode, encoded_articles
from fedbert_ds.data.token_files import OFFSETS, TOKENS, WORD_STARTS, StoredText, id_type, token_writer
from fedbert_ds.errors import DataError
from fedbert_ds.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def stored(folder: Path, articles: list[Article], tokenizer: Any, length: int, vocab_size: int = 400) -> StoredText:
    with token_writer(folder, "text", vocab_size) as writer:
        for part in encoded_articles(articles, tokenizer, length):
            writer.add(part)
    return StoredText(folder, "text", vocab_size)


@pytest.mark.parametrize("vocab_size", [400, 1 << 16, (1 << 16) + 1])
def test_every_reader_finds_what_is_in_memory(
    tmp_path: Path, articles: list[Article], any_tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> None:
    vocab_size = max(vocab_size, len(any_tokenizer))
    here, there = encode(articles, any_tokenizer, 24), stored(tmp_path, articles, any_tokenizer, 24, vocab_size)
    assert (there.num_sequences, there.num_tokens) == (here.num_sequences, here.num_tokens)
    for ours, theirs in zip(there.arrays(), here.arrays(), strict=True):
        assert (ours == theirs).all()
    assert there.digest(here.num_tokens) == here.digest(here.num_tokens) != here.digest(here.num_tokens - 1)
    assert there.count(5) == here.count(5) == int((here.tokens == 5).sum())
    assert there.spread(100) == here.spread(100) and there.pieces([3, 1]) == here.pieces([3, 1])


@pytest.mark.parametrize("whole_word", [False, True])
def test_batches_are_those_of_the_text_in_memory(
    tmp_path: Path, articles: list[Article], wordpiece: PreTrainedTokenizerFast, whole_word: bool
) -> None:
    settings: dict[str, Any] = {"mask_probability": 0.3, "whole_word": whole_word, "seed": 1, "client": "ada"}
    texts = encode(articles, wordpiece, 24), stored(tmp_path, articles, wordpiece, 24)
    streams = [BatchStream(text, wordpiece, **settings) for text in texts]
    for window in range(30):
        here, there = (stream.next_batch(window, 1500) for stream in streams)
        assert here.input_ids.equal(there.input_ids) and here.labels.equal(there.labels)
        assert here.lengths == there.lengths and here.masked_positions.equal(there.masked_positions)
    assert streams[0].state_dict() == streams[1].state_dict() and streams[0].state_dict()["epoch"] > 0


def test_what_is_put_by_is_on_disk_and_leaves_nothing_there(
    tmp_path: Path, articles: list[Article], wordpiece: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = stored(tmp_path, articles, wordpiece, 24)
    files = sorted(tmp_path.iterdir())
    for size in (3, 100_000):
        numbers = np.arange(size, dtype=np.int32)[::-1].copy()
        in_memory, expected = weakref.ref(numbers), numbers.tolist()
        found = text.put_by(numbers)
        del numbers
        assert in_memory() is None
        assert isinstance(found(), np.memmap) and found().dtype == np.int32 and found().tolist() == expected
    assert sorted(tmp_path.iterdir()) == files
    # Where nothing more can be written, such as a full disk.
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert text.put_by(np.arange(4))().tolist() == [0, 1, 2, 3]
    text.close()


@given(
    block=st.integers(1, 400),
    p=st.floats(0.05, 0.9),
    whole_word=st.booleans(),
    of=st.sets(st.integers(0, 90), min_size=1),
)
def test_some_pieces_are_masked_as_the_whole_text_is(
    articles: list[Article], wordpiece: PreTrainedTokenizerFast, block: int, p: float, whole_word: bool, of: set[int]
) -> None:
    """However little of it is in memory at once: every bit of an evaluation stays what it was."""
    text = encode(articles[:20], wordpiece, 24)
    assert text.num_sequences > 90
    masker = Masker(wordpiece, mask_probability=p, whole_word=whole_word)
    arrays = text.arrays()
    input_ids, positions, labels = masker.mask(arrays.tokens, arrays.word_starts, generator("test", block))
    targets = np.full(len(input_ids), -1)
    targets[positions] = labels
    pieces = text.pieces(sorted(of))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_BLOCK_TOKENS", block)
        found = masker.mask_pieces(text, pieces, generator("test", block))
    expected = np.concatenate([targets[piece] for piece in pieces])
    assert (found[0] == np.concatenate([input_ids[piece] for piece in pieces])).all()
    assert (found[1] == np.flatnonzero(expected >= 0)).all() and (found[2] == expected[expected >= 0]).all()


def test_an_evaluation_reads_a_text_on_disk_alike(
    tmp_path: Path, articles: list[Article], wordpiece: PreTrainedTokenizerFast
) -> None:
    settings: dict[str, Any] = {"mask_probability": 0.3, "whole_word": False, "seed": 1, "client": "ada"}
    here, there = (
        evaluation_batch(text, wordpiece, max_tokens=500, **settings)
        for text in (encode(articles, wordpiece, 24), stored(tmp_path, articles, wordpiece, 24))
    )
    assert here.input_ids.equal(there.input_ids) and here.labels.equal(there.labels)


def test_a_text_is_read_on_when_its_files_are_gone(
    tmp_path: Path, articles: list[Article], wordpiece: PreTrainedTokenizerFast
) -> None:
    text = stored(tmp_path, articles, wordpiece, 24)
    before = text.take(text.pieces([0, 7]))[0]
    for path in tmp_path.iterdir():
        path.unlink()
    assert (text.take(text.pieces([0, 7]))[0] == before).all()
    text.close()


@pytest.mark.parametrize("suffix", [TOKENS, WORD_STARTS, OFFSETS])
def test_files_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, articles: list[Article], wordpiece: PreTrainedTokenizerFast, suffix: str
) -> None:
    stored(tmp_path, articles, wordpiece, 24).close()
    path = tmp_path / f"text{suffix}"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="not of the size that the files beside it say"):
        StoredText(tmp_path, "text", 400)


def test_a_text_without_tokens_is_one_line(tmp_path: Path, wordpiece: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="the text of this shard is empty"):
        stored(tmp_path, [], wordpiece, 24)


def test_ids_take_two_bytes_where_they_fit() -> None:
    assert id_type(1 << 16) == np.uint16 and id_type((1 << 16) + 1) == np.int32


def test_a_text_in_memory_counts_the_same_in_parts(
    articles: list[Article], wordpiece: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text: EncodedText = encode(articles, wordpiece, 24)
    whole = text.digest(1000), text.count(6)
    monkeypatch.setattr(masking, "_BLOCK_TOKENS", 7)
    assert (text.digest(1000), text.count(6)) == whole


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_what_was_read_of_a_text_on_disk_is_no_memory_of_the_process(tmp_path: Path) -> None:
    """An epoch reads all of a text that is larger than the memory that its owner allows."""

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile:"))

    ids, starts = np.ones(1 << 20, dtype=np.int32), np.ones(1 << 20, dtype=bool)
    with token_writer(tmp_path, "text", 400) as writer:
        for _ in range(32):
            writer.add(Encoded(ids, starts, [128] * (len(ids) // 128)))
    text = StoredText(tmp_path, "text", 400)
    before = mapped()
    for first in range(0, text.num_sequences, 64):
        text.take(text.pieces(range(first, first + 64)))
    assert mapped() - before < 24 << 20, "of 98 MB in files"
    text.close()
