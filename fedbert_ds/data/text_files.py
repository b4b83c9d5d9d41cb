"""Text files as lines: decompressed by suffix, in the encoding that is named or detected."""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from fedbert_ds.errors import DataError, warn

CHUNK_BYTES = 1 << 20
SAMPLE_BYTES = 1 << 16
"""Text around the first bytes that are not UTF-8, from which the encoding is guessed."""
REPLACED = "\ufffd"
"""Stands for bytes that the encoding has no character for."""

_NAMED = "data.encoding, --encoding"
_CONTROLS = bytes({*range(32)} - {*b"\t\n\r"})
_MANY = 0.3
"""Share of UTF-16's first or second bytes that would be control characters in another encoding."""
_SPACES = 0.02
"""Share of a text's characters that are spaces or end a line, at least."""
DETECTED = "utf-8"
"""The encoding of a file that is valid UTF-8 and has no mark."""
MARKS = (
    # UTF-32's little-endian mark begins with UTF-16's.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
"""Byte order marks, and what they say of the encoding."""


class _ZstdFile(io.RawIOBase):
    """A .zst file's content; zstandard's own reader takes a truncated file for a whole one."""

    def __init__(self, path: Path, mode: str) -> None:
        self._file = open(path, mode)  # noqa: SIM115 (closed below)
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of any file. EOFError in the middle of a frame."""
        while not self._ready:
            frame = self._frame
            rest = frame.unused_data if frame is not None and frame.eof else b""
            chunk = rest or self._file.read(CHUNK_BYTES)
            if not chunk:
                if frame is not None and not frame.eof:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if frame is None or frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        """Close the file beneath."""
        self._file.close()
        super().close()


def _zstd(path: Path, mode: str) -> io.BufferedReader:
    return io.BufferedReader(_ZstdFile(path, mode), CHUNK_BYTES)


_DECOMPRESS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
COMPRESSIONS = tuple(_DECOMPRESS)


@dataclass
class Encodings:
    """How files are to be decoded, and what became of them."""

    named: str | None = None
    """Of every file without a byte order mark; None: UTF-8, or what a file looks like."""
    replaced: int = 0
    """Characters that stand for bytes which could not be decoded."""
    found: dict[Path, str] = field(default_factory=dict)
    """Encodings of files that were looked at: they are read so again, and nothing is told twice."""


def form_of(path: Path) -> str:
    """The suffix that says what is in a file, in lower case: `.jsonl` of `notes.JSONL.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def lines_of(path: Path, newline: str | None = None, encodings: Encodings | None = None) -> Iterator[str]:
    """Lines of a text file; `newline` as `open` has it.

    DataError for a file that cannot be read or decompressed, or whose encoding is not to be found.
    """
    encodings = encodings or Encodings()
    with _errors_of(path):
        if path not in encodings.found:
            encodings.found[path] = _encoding_of(path, encodings)
        encoding = encodings.found[path]
        with opened(path) as file, io.TextIOWrapper(file, encoding, "replace", newline) as text:
            for line in text:
                # In UTF-8 that shows, every byte was decoded before: the sign stands in the text.
                if encoding != DETECTED:
                    encodings.replaced += line.count(REPLACED)
                yield line


@contextmanager
def whole(path: Path) -> Iterator[Any]:
    """A file to read here and there: its path, or its content decompressed, in a file without a
    name. DataError as `lines_of`.
    """
    if path.suffix.lower() not in _DECOMPRESS:
        yield path
        return
    with tempfile.TemporaryFile() as content:
        with _errors_of(path), opened(path) as packed:
            shutil.copyfileobj(packed, content, CHUNK_BYTES)
        content.seek(0)
        yield content


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: cannot be decompressed ({error}); compress it again") from error
    except OSError as error:
        told = f"{path}: cannot be read ({error.strerror or error})"
        if error.errno == errno.ENOSPC:
            raise DataError(f"{told}; it is decompressed in {tempfile.gettempdir()}, free some space there") from error
        raise DataError(f"{told}; check its permissions") from error


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed as its suffix says."""
    return cast("BinaryIO", _DECOMPRESS.get(path.suffix.lower(), open)(path, "rb"))


def _encoding_of(path: Path, encodings: Encodings) -> str:
    with opened(path) as file:
        start = file.read(CHUNK_BYTES)
        for mark, encoding in MARKS:
            if start.startswith(mark):
                return encoding
        if encodings.named is not None:
            return _known(encodings.named)
        if (found := _without_mark(start)) is not None:
            return _told(path, found)
        decoder = codecs.getincrementaldecoder("utf-8")()
        before, chunk = b"", start
        try:
            while chunk:
                decoder.decode(chunk)
                before, chunk = chunk, file.read(CHUNK_BYTES)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            at = max(0, len(before) + error.start - SAMPLE_BYTES // 2) // 2 * 2  # UTF-16 has pairs
            found = _guessed(path, (before + chunk + file.read(SAMPLE_BYTES))[at : at + SAMPLE_BYTES])
            return _told(path, found)
    return DETECTED


def _told(path: Path, found: str) -> str:
    warn(f"{path}: not UTF-8, read as {found}; name its encoding if that is wrong ({_NAMED})")
    return found


def _without_mark(start: bytes) -> str | None:
    """UTF-16 without its mark, of a script whose letters begin alike: every second byte is a zero
    or a small number. It would pass for UTF-8, where these are characters, too.
    """
    pairs = len(start) // 2
    even, odd = (pairs - len(start[at : 2 * pairs : 2].translate(None, _CONTROLS)) for at in (0, 1))
    for many, few, name in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if many > _MANY * pairs and few < many / 2:
            return name
    return None


def _known(name: str) -> str:
    try:
        known = codecs.lookup(name).name
    except LookupError as error:
        raise DataError(f"encoding {name}: there is none of that name; utf-8, cp1252 or latin-1, say") from error
    return "utf-8-sig" if known == DETECTED else known


def _guessed(path: Path, sample: bytes) -> str:
    """The encoding of a text that is not UTF-8.

    Of texts in Latin letters the two encodings of Windows are tried in order: guesses from bytes
    alone take one for the other. In the right one, what stands inside words are letters.
    """
    found = next((name for name in ("utf-16-le", "utf-16-be") if _is_utf_16(sample, name)), None)
    if found is not None:
        return found
    if _is_latin(sample):
        found = next((name for name in ("cp1252", "cp1250") if _words_are_letters(sample, name)), None)
    else:
        from charset_normalizer import from_bytes

        best = from_bytes(sample).best()
        found = None if best is None else best.encoding
    if found is None:
        raise DataError(f"{path}: neither UTF-8 nor of an encoding that shows; name it: {_NAMED}")
    return found


def _is_utf_16(sample: bytes, name: str) -> bool:
    """Whether a sample, of any script, is UTF-16 of this byte order: with spaces, and all text."""
    pairs = len(sample) // 2
    if sample[name == "utf-16-le" : 2 * pairs : 2].count(0) < _SPACES * pairs:
        return False
    # Its last character may be cut in two.
    text = codecs.getincrementaldecoder(name)("replace").decode(sample[: 2 * pairs])
    return REPLACED not in text and all(one.isprintable() or one.isspace() for one in text)


def _is_latin(sample: bytes) -> bool:
    """Most letters are ASCII's."""
    ascii_letters = sum(byte < 128 and chr(byte).isalpha() for byte in sample)
    return ascii_letters > sum(byte >= 128 for byte in sample)


def _words_are_letters(sample: bytes, encoding: str) -> bool:
    """Whether nearly all characters that ASCII has not are letters where they touch one."""
    text = sample.decode(encoding, "replace")
    inside = [one for before, one, after in zip(text, text[1:], text[2:], strict=False)
              if one > "\x7f" and (before.isalpha() and after.isalpha())]  # fmt: skip
    # Apostrophes and dashes join words.
    fits = sum(one.isalpha() or one in "\u2019\u2018\u00b4\u00ad\u2013\u2014" for one in inside)
    return fits >= 0.95 * len(inside)
