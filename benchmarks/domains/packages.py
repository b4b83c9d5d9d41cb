"""Where Debian's documentation packages keep their text, and how it becomes articles."""

from __future__ import annotations

import gzip
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.domains.html_text import text_of_html

Articles = Iterator[tuple[str, str]]
"""(title, text) of each article."""

_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
ENTRIES_PER_PAGE = 20


@dataclass(frozen=True)
class Domain:
    """One owner's text: a package of Debian and how it is read."""

    package: str
    read: Callable[[Path], Articles]
    """Articles under the folder where the package is unpacked, in the same order on every run."""


def dictionary(name: str, root: Path) -> Articles:
    """Pages of a dictionary in dictd's format, neighbouring entries together as in print."""
    folder = root / "usr/share/dictd"
    data = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
    lines = (folder / f"{name}.index").read_text("utf-8").splitlines()
    # Several headwords name one entry; an entry is read once, where it stands in the file.
    entries = {(_number(start), _number(length)) for title, start, length in map(_columns, lines) if _is_entry(title)}
    ordered = sorted(entries)
    for first in range(0, len(ordered), ENTRIES_PER_PAGE):
        page = [data[start : start + length] for start, length in ordered[first : first + ENTRIES_PER_PAGE]]
        yield (
            f"page {first // ENTRIES_PER_PAGE + 1}",
            "\n\n".join(one.decode("utf-8", "replace").strip() for one in page),
        )


def pages(folder: str, pattern: str, root: Path) -> Articles:
    """HTML pages under a folder, without markup and navigation."""
    for path in sorted((root / folder).glob(pattern)):
        yield path.stem, text_of_html(path.read_text("utf-8", "replace"))


def sources(folder: str, pattern: str, root: Path) -> Articles:
    """Text files under a folder, as they are."""
    for path in sorted((root / folder).rglob(pattern)):
        yield path.name.split(".")[0], path.read_text("utf-8", "replace")


DOMAINS = {
    "gcide": Domain("dict-gcide", partial(dictionary, "gcide")),
    "foldoc": Domain("dict-foldoc", partial(dictionary, "foldoc")),
    "handbook": Domain("debian-handbook", partial(pages, "usr/share/doc/debian-handbook/html/en-US", "*.html")),
    "reference": Domain("debian-reference-en", partial(pages, "usr/share/debian-reference", "*.en.html")),
    "python": Domain("python3.11-doc", partial(sources, "usr/share/doc/python3.11/html/_sources", "*.rst.txt")),
    "sqlite": Domain("sqlite3-doc", partial(pages, "usr/share/doc/sqlite3", "**/*.html")),
}
"""A name for each owner. The Bible's package has a format of its own, manual pages need a
formatter: both are left out."""


def _columns(line: str) -> list[str]:
    return line.split("\t")[:3]


def _is_entry(title: str) -> bool:
    # Entries about the dictionary itself: licences and addresses.
    return not title.startswith("00-database") and not title.startswith("00database")


def _number(digits: str) -> int:
    """A number in dictd's base 64, most significant digit first."""
    value = 0
    for digit in digits:
        value = 64 * value + _DIGITS.index(digit)
    return value
