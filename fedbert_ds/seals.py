"""Sizes and hashes of files, so that damage is seen before anything of them is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from fedbert_ds.atomic_write import sync

CHUNK_BYTES = 1 << 20
HASHERS = 4
"""Threads: a hash releases the interpreter, and a disk reads ahead for each."""


class Seal(TypedDict):
    """What a file was when it was written."""

    bytes: int
    sha256: str


def seal_of(path: Path) -> Seal:
    """Of one file. Raises OSError as the file system does."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return Seal(bytes=size, sha256=digest.hexdigest())


def seals_of(folder: Path) -> dict[str, Seal]:
    """Of every file below a folder, by its path there with slashes."""
    paths = sorted(_files(folder))
    with ThreadPoolExecutor(HASHERS) as pool:
        seals = list(pool.map(seal_of, paths))
    return {path.relative_to(folder).as_posix(): seal for path, seal in zip(paths, seals, strict=True)}


def damage_of(folder: Path, seals: Mapping[str, Seal]) -> str | None:
    """What is wrong with the first file that is not as it was sealed, as a phrase; None if all are.

    Sizes are compared before anything is read. Files that came later are not looked at.
    """
    for name, seal in seals.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if size != seal["bytes"]:
            return f"{name} has {size:,} bytes, saved were {seal['bytes']:,}"
    with ThreadPoolExecutor(HASHERS) as pool:
        found = pool.map(_digest, (folder / name for name in seals))
        for (name, seal), digest in zip(seals.items(), found, strict=True):
            if digest != seal["sha256"]:
                return f"{name} is not what was saved (SHA-256)"
    return None


def sync_tree(folder: Path) -> None:
    """Return when every file and folder below, and the folder itself, is on disk."""
    for path in _files(folder):
        sync(path)
    for name, _, _ in os.walk(folder):
        sync(Path(name))


def _digest(path: Path) -> str:
    try:
        return seal_of(path)["sha256"]
    except OSError:
        return ""


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
