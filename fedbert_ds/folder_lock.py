"""One process at a time writes to a folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import RunError

LOCK = "lock"
"""The file that is locked. It stays: whoever removes it lets two processes in."""
HOLDER = "lock-holder.txt"
"""Says who has it. Only for a reader: the system forgets a lock when its process ends."""


@contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs; RunError, one line, if one is in,
    and as `check_usable`.

    `key` is what the user sets to name another folder. The folder is made if it is missing, for its
    owner's eyes alone. A process that is killed lets go. Where the file system knows no locks,
    nothing is kept out.
    """
    check_usable(folder, key)
    private_folder(folder)
    lock = FileLock(folder / LOCK, timeout=0, mode=0o600)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"{folder}: in use by {_holder(folder)}; end that first, or set another {key}") from None
    except NotImplementedError:  # filelock's word for such a file system
        yield
        return
    try:
        write_text(folder / HOLDER, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def check_usable(folder: Path, key: str) -> None:
    """RunError, before anything is written, for a folder that is a file, that lies below one, or in
    which this user can write nothing. `key` is what the user sets to name another.
    """
    try:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror}; set another {key}") from None
    if not place.is_dir():
        raise RunError(f"{folder}: {'' if place == folder else f'{place} '}is a file and no folder; set another {key}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(f"{folder}: nothing can be written in {place}; change its permissions, or set another {key}")


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is missing or has nothing in it, but for what a lock leaves."""
    return not folder.exists() or all(path.name in (LOCK, HOLDER) for path in folder.iterdir())


def private_folder(folder: Path) -> None:
    """Make a folder that only its owner may open. One that exists keeps its mode."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def private() -> Iterator[None]:
    """What the process makes in this block, nobody but its owner may read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def keep_private() -> None:
    """Let nobody but its owner read what this process writes from now on."""
    os.umask(0o077)


def _holder(folder: Path) -> str:
    try:
        return (folder / HOLDER).read_text(encoding="utf-8").strip() or "another process"
    except OSError:
        return "another process"
