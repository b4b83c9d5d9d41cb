"""Word counts of many owners: what leaves each, which words count, and what each revealed.

Pure but for the files at the end.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.atomic_write import write_text
from fedbert_ds.data.tokenizer import count_words
from fedbert_ds.errors import DataError

FORMAT = "fedbert-ds word counts 1"


@dataclass(frozen=True)
class WordCounts:
    """What one owner gives away: words of its text, and how often each occurs."""

    owner: str
    words: Mapping[str, int]
    selected: bool = False
    """Whether only words were kept that enough owners have, found by digests."""

    def __post_init__(self) -> None:
        """ValueError for what no owner can have counted."""
        if not self.owner:
            raise ValueError("the owner has no name")
        if count_words(self.words) != dict.fromkeys(self.words, 1):
            wrong = next(word for word in self.words if count_words([word]) != {word: 1})
            raise ValueError(f"{wrong!r} is no word of a lower-casing BERT tokenizer")
        if few := [word for word, count in self.words.items() if count < 1]:
            raise ValueError(f"{few[0]!r} occurs {self.words[few[0]]} times")


@dataclass(frozen=True)
class Revealed:
    """What one owner's counts told whoever merged them."""

    owner: str
    words: int
    """In plain, with how often each occurs."""
    used: int
    """Of these, words that enough owners have."""
    alone: int
    """Words that no other owner has: nothing was gained by showing them."""
    selected: bool


def restrict(
    words: Mapping[str, int], minimum: int = 1, most: int | None = None, digits: bool = True
) -> dict[str, int]:
    """The words that occur at least `minimum` times, the `most` most frequent of them, and without
    `digits` only those that have none. Ties go by the alphabet.
    """
    kept = {
        word: count
        for word, count in words.items()
        if count >= minimum and (digits or not any(character.isdigit() for character in word))
    }
    return dict(sorted(kept.items(), key=lambda entry: (-entry[1], entry[0]))[:most])


def merge_counts(counts: Sequence[WordCounts], least: int) -> dict[str, int]:
    """Sums over owners, of words that at least `least` owners have; sorted.

    DataError if two are of one owner, if there are fewer owners than that, or if no word is left.
    """
    owners = Counter(one.owner for one in counts)
    if twice := [owner for owner, number in owners.items() if number > 1]:
        raise DataError(f"two files are of {twice[0]}, whose words would count twice; give one of each owner")
    if not 1 <= least <= len(counts):
        raise DataError(f"--least {least}: counts of {len(counts)} owners are here; choose 1 to {len(counts)}")
    having = Counter(word for one in counts for word in one.words)
    sums = Counter[str]()
    for one in counts:
        sums.update({word: count for word, count in one.words.items() if having[word] >= least})
    if not sums:
        raise DataError(f"no word is one of {least} owners; lower --least, or let owners restrict their counts less")
    return dict(sorted(sums.items()))


def revealed(counts: Sequence[WordCounts], merged: Mapping[str, int]) -> list[Revealed]:
    """What each owner revealed for `merged`, in the order of `counts`."""
    having = Counter(word for one in counts for word in one.words)
    return [
        Revealed(
            owner=one.owner,
            words=len(one.words),
            used=sum(word in merged for word in one.words),
            alone=sum(having[word] == 1 for word in one.words),
            selected=one.selected,
        )
        for one in counts
    ]


def write_counts(path: Path, counts: WordCounts) -> None:
    """Write one owner's counts as JSON, whole or not at all."""
    document = {"format": FORMAT, "owner": counts.owner, "selected": counts.selected, "words": dict(counts.words)}
    write_text(path, json.dumps(document, ensure_ascii=False, indent=0) + "\n")


def read_counts(path: Path) -> WordCounts:
    """The counts of `write_counts`; DataError, one line, for anything else."""
    document = read_document(path, FORMAT, {"owner": str, "selected": bool, "words": dict})
    words = document["words"]
    if not all(type(count) is int for count in words.values()):
        raise DataError(f"{path}: a word's count is no number; make it with fedbert-ds vocab count")
    try:
        return WordCounts(document["owner"], words, document["selected"])
    except ValueError as error:
        raise DataError(f"{path}: {error}; make it with fedbert-ds vocab count") from error


def read_document(path: Path, kind: str, fields: Mapping[str, type]) -> dict[str, Any]:
    """A JSON file of this format with these fields; DataError, one line, for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; give {_article(kind)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({type(error).__name__}); give {_article(kind)}") from error
    if not isinstance(document, dict) or document.get("format") != kind:
        found = document.get("format") if isinstance(document, dict) else None
        raise DataError(f"{path}: is {found or 'something else'}, not {kind}; give {_article(kind)}")
    for name, wanted in fields.items():
        if type(document.get(name)) is not wanted:
            raise DataError(f"{path}: has no right {name}; make it again")
    return document


def _article(kind: str) -> str:
    return f"a file of {kind!r}"
