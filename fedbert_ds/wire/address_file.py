"""The file that tells a run's clients where the server is, or that the run is complete."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import RunOver, ServerAway
from fedbert_ds.wire.host_port import parted

SUFFIX = ".address"
"""Ends the file's name; nothing else that a client may be given as the server does."""

LOOK_SECONDS = 0.2
"""Between two looks at a file whose news is awaited."""

COMPLETE = "complete"
"""What the file holds once the run is complete, until the run is extended."""


def reveal(file: Path, address: str) -> None:
    """Tell clients that the server is at `address`, host:port."""
    write_text(file, address + "\n")


def hide(file: Path) -> None:
    """Tell clients to wait: there is no server, for now."""
    file.unlink(missing_ok=True)


def close(file: Path) -> None:
    """Tell clients that the run is complete and needs none of them."""
    write_text(file, COMPLETE + "\n")


def news_of(server: str) -> Callable[[], bool]:
    """A question for later: has a server written the file `server` since this call?

    A server writes it once, when it lets clients in, and `complete` at the end of a run; so what
    was known of the server before is over. The moment of writing counts, too: a server that comes
    back on its old port writes the same words, while its other ranks may be elsewhere. A file that
    is removed is no news: a server removes it before it hands over, while its clients still have
    something to send, and where there is no file there is no other server to turn to. Nor is one
    that is half written, as where a run folder is mirrored. Never true for host:port.
    """
    known = _writing(server)

    def is_written() -> bool:
        return (now := _writing(server)) is not None and now != known

    return is_written


def await_news(is_news: Callable[[], bool], seconds: float) -> None:
    """Wait so long, but no longer than until there is news."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not is_news():
        time.sleep(min(left, LOOK_SECONDS))


def _writing(server: str) -> tuple[int, str] | None:
    """When the file was written, and what; None without one. Not its inode: that of a removed file
    is given to the next one.
    """
    if not server.endswith(SUFFIX):
        return None
    try:
        # A look by name alone may be answered from the cache of a network's file system.
        with open(server, encoding="utf-8") as file:
            written, words = os.fstat(file.fileno()).st_mtime_ns, file.read().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return (written, words) if _is_whole(words) else None


def _is_whole(words: str) -> bool:
    if words == COMPLETE:
        return True
    try:
        parted(words)
    except ValueError:
        return False
    return True


def look_up(server: str) -> str:
    """host:port of the server, read from its file if `server` names one.

    Raises ServerAway where there is no such file, or one that is not whole yet; RunOver where it
    says that the run is complete.
    """
    if not server.endswith(SUFFIX):
        return server
    if (writing := _writing(server)) is None:
        if Path(server).is_file():
            raise ServerAway(f"{server}: no HOST:PORT can be read in it; copy it anew from the server's run folder")
        raise ServerAway(f"{server}: no such file; is the server running, and is this its run folder?")
    if writing[1] == COMPLETE:
        raise RunOver(f"{server}: the run is complete; nothing is left to do")
    return writing[1]
