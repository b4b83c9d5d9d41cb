"""Which words enough owners have, found by keyed digests, so that other words never leave an owner.

Owners share a key that whoever compares the digests does not have. HMAC-SHA256 (RFC 2104) of a word
then says nothing to that party but whether two owners have the same word. It is no more than that:
a holder of the key can test guessed words against any digests that it sees.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import DataError
from fedbert_ds.vocabulary.counts import read_document

DIGESTS_FORMAT = "fedbert-ds word digests 1"
COMMON_FORMAT = "fedbert-ds common digests 1"
SHORTEST_KEY = 32
"""Bytes of a key file: a passphrase would be guessed."""


@dataclass(frozen=True)
class WordDigests:
    """What one owner gives away in the first round: how many words it has, and their digests."""

    owner: str
    digests: Sequence[str]


def digest(word: str, key: bytes) -> str:
    """HMAC-SHA256 of a word, 64 hexadecimal digits."""
    return hmac.new(key, word.encode(), hashlib.sha256).hexdigest()


def digests_of(words: Iterable[str], key: bytes) -> list[str]:
    """Sorted, so that their order tells nothing of frequency."""
    return sorted(digest(word, key) for word in words)


def common_digests(owners: Sequence[WordDigests], least: int) -> list[str]:
    """Digests that at least `least` owners have, sorted.

    DataError if two are of one owner, or there are fewer owners than that.
    """
    names = Counter(one.owner for one in owners)
    if twice := [name for name, number in names.items() if number > 1]:
        raise DataError(f"two files are of {twice[0]}, whose words would count twice; give one of each owner")
    if not 1 <= least <= len(owners):
        raise DataError(f"--least {least}: digests of {len(owners)} owners are here; choose 1 to {len(owners)}")
    having = Counter(one for owner in owners for one in set(owner.digests))
    return sorted(one for one, number in having.items() if number >= least)


def select(words: Mapping[str, int], key: bytes, common: Collection[str]) -> dict[str, int]:
    """The words whose digests are in `common`, with their counts."""
    wanted = frozenset(common)
    return {word: count for word, count in words.items() if digest(word, key) in wanted}


def read_key(path: Path) -> bytes:
    """The bytes of a key file, without white space at its ends; DataError if there are too few."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise DataError(f"--key {path}: cannot be read; make one with: openssl rand -hex 32 > {path}") from error
    if len(key) < SHORTEST_KEY:
        raise DataError(
            f"--key {path}: {len(key)} bytes are too few, use {SHORTEST_KEY} or more: openssl rand -hex 32 > {path}"
        )
    return key


def write_digests(path: Path, owner: WordDigests) -> None:
    """Write one owner's digests as JSON, whole or not at all."""
    document = {"format": DIGESTS_FORMAT, "owner": owner.owner, "digests": list(owner.digests)}
    write_text(path, json.dumps(document, indent=0) + "\n")


def read_digests(path: Path) -> WordDigests:
    """The digests of `write_digests`; DataError, one line, for anything else."""
    document = read_document(path, DIGESTS_FORMAT, {"owner": str, "digests": list})
    return WordDigests(document["owner"], _checked(path, document["digests"]))


def write_common(path: Path, digests: Sequence[str], least: int) -> None:
    """Write what at least `least` owners have as JSON, whole or not at all."""
    document = {"format": COMMON_FORMAT, "least": least, "digests": list(digests)}
    write_text(path, json.dumps(document, indent=0) + "\n")


def read_common(path: Path) -> list[str]:
    """The digests of `write_common`; DataError, one line, for anything else."""
    return _checked(path, read_document(path, COMMON_FORMAT, {"least": int, "digests": list})["digests"])


def _checked(path: Path, digests: list[object]) -> list[str]:
    found = [one for one in digests if isinstance(one, str) and re.fullmatch("[0-9a-f]{64}", one)]
    if len(found) != len(digests):
        raise DataError(f"{path}: holds something else than digests; make it again")
    return found
