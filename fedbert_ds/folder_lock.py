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
    """Keep other processes out of a folder while the block runs; RunError, one line, if one is in.

    `key` is what the user sets to name another folder. The folder is made if it is missing, for its
    owner's eyes alone. A process that is killed lets go. Where the file system knows no locks,
    nothing is kept out.
    """
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
