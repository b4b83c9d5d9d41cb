"""A text's tokens in files: written as they come, read through memory maps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fedbert_ds.data.masking import NO_TOKEN, Arrays, Encoded, Sequences
from fedbert_ds.errors import DataError

TOKENS, WORD_STARTS, OFFSETS = ".tokens", ".starts", ".offsets"
"""What a text's files end in: token ids, a byte a token, and int64."""


class StoredText(Sequences):
    """A text on disk. Its files stay open, so that it can be read when they have lost their names.

    DataError for files that do not fit each other, OSError as the file system does.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self._tokens, self._starts, self._offsets = (
            (folder / f"{name}{suffix}").open("rb") for suffix in (TOKENS, WORD_STARTS, OFFSETS)
        )
        self._folder = folder
        self._put_by: BinaryIO | None = None
        self._id_type = id_type(vocab_size)
        self._num_sequences = _bytes_of(self._offsets) // 8 - 1
        self._num_tokens = _bytes_of(self._starts)
        if self._num_sequences < 1:
            raise DataError(NO_TOKEN)
        if (
            _bytes_of(self._tokens) != self._num_tokens * self._id_type.itemsize
            or int(self.arrays().offsets[-1]) != self._num_tokens
        ):
            raise DataError(f"{folder / name}{TOKENS}: not of the size that the files beside it say; remove {folder}")

    @property
    def num_sequences(self) -> int:
        """See `Sequences`."""
        return self._num_sequences

    @property
    def num_tokens(self) -> int:
        """See `Sequences`."""
        return self._num_tokens

    def arrays(self) -> Arrays:
        """See `Sequences`; new maps in every call, so that no more of the files counts as this
        process's memory than was read since.
        """
        return Arrays(
            np.memmap(self._tokens, self._id_type, mode="r"),
            np.memmap(self._starts, np.bool_, mode="r"),
            np.memmap(self._offsets, np.int64, mode="r"),
        )

    def put_by(self, numbers: np.ndarray) -> Callable[[], np.ndarray]:
        """See `Sequences`; in a file without a name, which is gone with this process."""
        if self._put_by is not None:
            self._put_by.close()
        dtype = numbers.dtype
        try:
            file = self._put_by = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - `close` closes it
            numbers.tofile(file)
        except OSError:  # full, or not to be written: the text can be read all the same
            return lambda: numbers
        return lambda: np.memmap(file, dtype, mode="r")

    def close(self) -> None:
        """Close the files."""
        for file in (self._tokens, self._starts, self._offsets, self._put_by):
            if file is not None:
                file.close()


class TokenWriter:
    """Appends articles' sequences to a text's files."""

    def __init__(self, tokens: BinaryIO, starts: BinaryIO, offsets: BinaryIO, vocab_size: int) -> None:
        self._tokens, self._starts, self._offsets = tokens, starts, offsets
        self._id_type = id_type(vocab_size)
        self._end = 0
        offsets.write(np.zeros(1, dtype=np.int64).tobytes())

    def add(self, part: Encoded) -> None:
        """Put an article's sequences behind the others."""
        ends = self._end + np.cumsum(part.lengths, dtype=np.int64)
        self._tokens.write(part.tokens.astype(self._id_type).tobytes())
        self._starts.write(part.word_starts.tobytes())
        self._offsets.write(ends.tobytes())
        self._end = int(ends[-1]) if len(ends) else self._end


@contextmanager
def token_writer(folder: Path, name: str, vocab_size: int) -> Iterator[TokenWriter]:
    """Write the files of a text of this name, until the block ends."""
    with ExitStack() as files:
        tokens, starts, offsets = (
            files.enter_context((folder / f"{name}{suffix}").open("wb")) for suffix in (TOKENS, WORD_STARTS, OFFSETS)
        )
        yield TokenWriter(tokens, starts, offsets, vocab_size)


def id_type(vocab_size: int) -> np.dtype:
    """The smallest type of integers that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def _bytes_of(file: BinaryIO) -> int:
    return file.seek(0, 2)
