"""Entries of the cache: whole and of the same text, or made again; private; one at a time."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedbert_ds.data.token_cache import SEALS, SUMMARY, Summary, TokenCache, key_of
from fedbert_ds.errors import DataError

SEEN = Summary(2, 30, 4000, 12, ("left out: 1 file (.docx)",))
TEXT, TOKENS = key_of("a text"), key_of("a tokenizer")


def write(folder: Path) -> None:
    (folder / "text.tokens").write_bytes(b"\1\2\3\4")


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "tokens")


def test_an_entry_is_found_again_with_what_was_read(cache: TokenCache) -> None:
    assert cache.entry(TEXT, TOKENS) is None and cache.summary(TEXT) is None
    made = cache.make(TEXT, TOKENS, SEEN, write)
    assert cache.entry(TEXT, TOKENS) == made and (made / "text.tokens").read_bytes() == b"\1\2\3\4"
    assert cache.summary(TEXT) == SEEN
    assert cache.entry(TEXT, key_of("another tokenizer")) is None and cache.summary(key_of("another text")) is None


def test_only_its_owner_may_open_it(cache: TokenCache) -> None:
    entry = cache.make(TEXT, TOKENS, SEEN, write)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache.folder, entry)] == [0o700, 0o700]
    assert {stat.S_IMODE(path.stat().st_mode) for path in entry.iterdir()} == {0o600}


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "text.tokens").write_bytes(b"\1\2\3\5"),
        lambda entry: (entry / "text.tokens").write_bytes(b"\1\2"),
        lambda entry: (entry / "text.tokens").unlink(),
        lambda entry: (entry / SUMMARY).write_text((entry / SUMMARY).read_text().replace("30", "31")),
        lambda entry: (entry / SEALS).write_text("{"),
        lambda entry: (entry / SEALS).write_text("{}"),
        lambda entry: (entry / SEALS).write_text("[]"),
        lambda entry: (entry / SEALS).unlink(),
    ],
)
def test_a_damaged_entry_is_removed_and_told(cache: TokenCache, capsys: pytest.CaptureFixture[str], damage) -> None:
    damage(cache.make(TEXT, TOKENS, SEEN, write))
    assert cache.summary(TEXT) in (None, SEEN)
    assert cache.entry(TEXT, TOKENS) is None
    assert "; the text is tokenized again" in capsys.readouterr().out
    assert not list(cache.folder.iterdir())


def test_numbers_that_were_changed_are_not_taken(cache: TokenCache) -> None:
    path = cache.make(TEXT, TOKENS, SEEN, write) / SUMMARY
    path.write_text(json.dumps({**json.loads(path.read_text()), "characters": 4001}))
    assert cache.summary(TEXT) is None


def test_a_process_that_dies_while_it_writes_leaves_nothing_that_counts(cache: TokenCache) -> None:
    program = (
        "import os, sys, pathlib; from fedbert_ds.data.token_cache import *\n"
        "def dies(folder): (folder / 'text.tokens').write_bytes(b'1234'); os._exit(9)\n"
        "TokenCache(pathlib.Path(sys.argv[1])).make(*sys.argv[2:], Summary(1, 1, 1, 1), dies)"
    )
    command = [sys.executable, "-c", program, str(cache.folder), TEXT, TOKENS]
    assert subprocess.run(command, timeout=300, check=False).returncode == 9
    (left,) = cache.folder.iterdir()
    assert cache.entry(TEXT, TOKENS) is None and cache.summary(TEXT) is None
    made = cache.make(TEXT, TOKENS, SEEN, write)
    assert list(cache.folder.iterdir()) == [made] and left != made


def test_an_error_while_it_is_written_leaves_nothing(cache: TokenCache) -> None:
    def fails(folder: Path) -> None:
        write(folder)
        raise DataError("the text changed")

    with pytest.raises(DataError, match="the text changed"):
        cache.make(TEXT, TOKENS, SEEN, fails)
    assert not list(cache.folder.iterdir())


def test_another_text_takes_its_place_and_nothing_else_goes(cache: TokenCache) -> None:
    """Tokens of private text do not pile up; what a user has in the folder stays."""
    cache.make(TEXT, TOKENS, SEEN, write)
    (cache.folder / "notes").mkdir()
    (cache.folder / "mine.txt").write_text("mine")
    other = cache.make(key_of("another text"), TOKENS, SEEN, write)
    assert sorted(cache.folder.iterdir()) == sorted([other, cache.folder / "mine.txt", cache.folder / "notes"])


def test_a_full_disk_is_one_line(cache: TokenCache) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot be kept there \(No space left on device\); name a folder with room"):
        cache.make(TEXT, TOKENS, SEEN, full)
    (cache.folder.parent / "file").write_text("")
    with pytest.raises(DataError, match="cannot be kept there"):
        TokenCache(cache.folder.parent / "file").make(TEXT, TOKENS, SEEN, write)
