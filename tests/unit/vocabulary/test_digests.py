"""Digests find the words that merging would have used, and name none of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.errors import DataError
from fedbert_ds.vocabulary.counts import WordCounts, merge_counts
from fedbert_ds.vocabulary.digests import (
    COMMON_FORMAT,
    DIGESTS_FORMAT,
    WordDigests,
    common_digests,
    digest,
    digests_of,
    read_common,
    read_digests,
    read_key,
    select,
    write_common,
    write_digests,
)

KEY = bytes(range(32))
WORDS = st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers(1, 9), max_size=8)


def test_a_digest_is_hmac_sha256() -> None:
    """RFC 4231, test case 2."""
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert digest("what do ya want for nothing?", b"Jefe") == expected


@given(st.lists(WORDS, min_size=1, max_size=5), st.data())
def test_two_rounds_merge_what_one_would(tables: list[dict[str, int]], data: st.DataObject) -> None:
    least = data.draw(st.integers(1, len(tables)))
    names = [f"owner {number}" for number in range(len(tables))]
    common = common_digests(
        [WordDigests(name, digests_of(words, KEY)) for name, words in zip(names, tables, strict=True)], least
    )
    selected = [select(words, KEY, common) for words in tables]
    for words, chosen in zip(tables, selected, strict=True):
        expected = {word for word in words if sum(word in other for other in tables) >= least}
        assert chosen == {word: words[word] for word in words if word in expected}, "no other word leaves"
    if any(selected):
        plain = merge_counts([WordCounts(name, words) for name, words in zip(names, tables, strict=True)], least)
        counts = [WordCounts(name, words, True) for name, words in zip(names, selected, strict=True)]
        assert merge_counts(counts, least) == plain


@given(st.sets(st.text("abcdef", min_size=1), max_size=20))
def test_digests_say_neither_words_nor_their_order(words: set[str]) -> None:
    found = digests_of(words, KEY)
    assert found == sorted(found) and len(found) == len(words)
    assert not set(found) & set(digests_of(words, KEY[::-1])), "another key, other digests"


def test_an_owner_who_repeats_a_digest_is_still_one_owner() -> None:
    """Or one could raise any word over the threshold."""
    mine, other = digest("secret", KEY), digest("common", KEY)
    owners = [WordDigests("ada", [mine, mine, mine, other]), WordDigests("bo", [other])]
    assert common_digests(owners, 2) == [other]


def test_owners_that_do_not_fit_are_one_line() -> None:
    one = WordDigests("ada", [])
    with pytest.raises(DataError, match="two files are of ada"):
        common_digests([one, one], 2)
    for least in (0, 3):
        with pytest.raises(DataError, match=rf"--least {least}: digests of 2 owners are here; choose 1 to 2"):
            common_digests([one, WordDigests("bo", [])], least)


def test_files_come_back_equal(tmp_path: Path) -> None:
    digests = digests_of(["a", "b"], KEY)
    write_digests(tmp_path / "d.json", WordDigests("é", digests))
    assert read_digests(tmp_path / "d.json") == WordDigests("é", digests)
    write_common(tmp_path / "c.json", digests, 3)
    assert read_common(tmp_path / "c.json") == digests
    assert "a" not in json.loads((tmp_path / "d.json").read_text())["digests"]


@pytest.mark.parametrize("digests", [["xyz"], [3], ["0" * 63], ["A" * 64], ["0" * 64 + "\n"], [["0" * 64]]])
def test_other_files_are_one_line(tmp_path: Path, digests: list[object]) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"format": DIGESTS_FORMAT, "owner": "ada", "digests": digests}))
    with pytest.raises(DataError, match="holds something else than digests; make it again"):
        read_digests(path)
    with pytest.raises(DataError, match=f"is {DIGESTS_FORMAT}, not {COMMON_FORMAT}"):
        read_common(path)
    path.write_text(json.dumps({"format": COMMON_FORMAT, "least": 2, "digests": digests}))
    with pytest.raises(DataError, match="holds something else than digests"):
        read_common(path)


def test_a_key_must_be_long_and_there(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(DataError, match=r"--key \S+key: cannot be read; make one with: openssl rand -hex 32"):
        read_key(path)
    path.write_bytes(b"  " + b"k" * 31 + b"\n")
    with pytest.raises(DataError, match="31 bytes are too few, use 32 or more"):
        read_key(path)
    path.write_bytes(b"k" * 32 + b"\r\n")
    assert read_key(path) == b"k" * 32, "an editor's end of line makes no other key"
