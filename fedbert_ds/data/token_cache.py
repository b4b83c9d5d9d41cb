"""An owner's text as tokens on disk, kept from one start of a client to the next.

An entry is a folder. It gets its name when it is whole and on disk, with the size and SHA-256 of
every file, which are compared before it is used. Its name says which files it was made of (path,
size, time of last change), how they were read, and by which tokenizer. One entry is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import DataError, warn
from fedbert_ds.folder_lock import private, private_folder
from fedbert_ds.seals import damage_of, seals_of, sync_tree

FORMAT = 1
"""Of an entry; entries of another are not read."""
SUMMARY, SEALS = "summary.json", "seals.json"
_UNFINISHED = "unfinished-"
_DIGITS = 24
_ENTRY = re.compile(f"[0-9a-f]{{{_DIGITS}}}-[0-9a-f]{{{_DIGITS}}}")
_DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError)
"""What reading damaged JSON files may raise."""


@dataclass(frozen=True)
class Summary:
    """What was read, and what its owner should know of it."""

    files: int
    articles: int
    characters: int
    longest_word: int
    """Characters."""
    remarks: tuple[str, ...] = ()
    """What was left out, divided or replaced, a sentence each."""


def key_of(*parts: Any) -> str:
    """A name that is the same for the same parts, which JSON must know."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:_DIGITS]


@dataclass(frozen=True)
class TokenCache:
    """The entries of one client's text."""

    folder: Path

    def summary(self, text: str) -> Summary | None:
        """What was read of the text of this key, if an entry has it."""
        for entry in sorted(self.folder.glob(f"{text}-*")):
            try:
                seals = json.loads((entry / SEALS).read_text(encoding="utf-8"))
                if damage_of(entry, {SUMMARY: seals[SUMMARY]}) is None:
                    found = json.loads((entry / SUMMARY).read_text(encoding="utf-8"))
                    return Summary(**{**found, "remarks": tuple(found["remarks"])})
            except _DAMAGED:
                continue
        return None

    def entry(self, text: str, tokens: str) -> Path | None:
        """The folder of an entry that is as it was written. One that is not is removed and told."""
        entry = self.folder / f"{text}-{tokens}"
        if not entry.is_dir():
            return None
        try:
            seals = json.loads((entry / SEALS).read_text(encoding="utf-8"))
            problem = damage_of(entry, seals) if SUMMARY in seals else f"{SEALS} is not of this version"
        except _DAMAGED:
            problem = f"{SEALS} cannot be read"
        if problem is None:
            return entry
        warn(f"{entry}: {problem}; the text is tokenized again")
        shutil.rmtree(entry, ignore_errors=True)
        return None

    def make(self, text: str, tokens: str, summary: Summary, write: Callable[[Path], None]) -> Path:
        """Let `write` write an entry's files into a folder; the folder of the entry, on disk.

        Other entries go. DataError where there is no room or no permission.
        """
        try:
            with self._unfinished() as folder:
                write(folder)
                write_text(folder / SUMMARY, json.dumps(asdict(summary)))
                write_text(folder / SEALS, json.dumps(seals_of(folder)))
                sync_tree(folder)
                entry = self.folder / f"{text}-{tokens}"
                shutil.rmtree(entry, ignore_errors=True)
                folder.rename(entry)
        except OSError as error:
            raise DataError(
                f"{self.folder}: the text's tokens cannot be kept there ({error.strerror or error}); name a folder "
                "with room in --cache, or --cache off to keep them in memory"
            ) from error
        for other in self.folder.iterdir():
            if other != entry and (_ENTRY.fullmatch(other.name) or other.name.startswith(_UNFINISHED)):
                shutil.rmtree(other, ignore_errors=True)
        return entry

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        private_folder(self.folder)
        with private():
            folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
