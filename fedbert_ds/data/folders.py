"""Which files of a folder are read, and which are left out and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

BESIDE = frozenset({"__MACOSX", "__pycache__"})
"""Folders that programs leave behind, besides hidden ones."""


@dataclass(frozen=True)
class Found:
    """The files of a folder."""

    files: list[Path]
    """By name."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many were not read, by reason."""


def find(folder: Path, is_readable: Callable[[Path], bool]) -> Found:
    """The files under a folder that `is_readable` takes.

    Hidden files and folders are left out: editors and systems keep copies there. So are folders
    without permission. Links to folders are not followed.
    """
    files: list[Path] = []
    left_out: Counter[str] = Counter()

    def unreadable(error: OSError) -> None:
        left_out[f"no permission: {error.filename}"] += 1

    for path, folders, names in os.walk(folder, onerror=unreadable):
        hidden = [name for name in folders if name.startswith(".") or name in BESIDE]
        left_out["hidden"] += len(hidden)
        folders[:] = [name for name in folders if name not in hidden]
        for name in names:
            file = Path(path) / name
            if name.startswith("."):
                left_out["hidden"] += 1
            elif not is_readable(file):
                left_out[file.suffix.lower() or "no suffix"] += 1
            elif not file.is_file():
                left_out["no file: a link to nowhere, or a device"] += 1
            else:
                files.append(file)
    return Found(sorted(files), +left_out)
