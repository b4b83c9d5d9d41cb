"""The file that tells a run's clients where the server is, or that the run is complete."""

from __future__ import annotations

import time
from pathlib import Path

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import RunOver, ServerAway

SUFFIX = ".address"
"""Ends the file's name; nothing else that a client may be given as the server does."""

LOOK_SECONDS = 0.2
"""Between two looks at a file whose change is awaited."""

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


def await_change(server: str, seconds: float) -> None:
    """Wait so long; where `server` names a file, only until the file says something else."""
    before, deadline = _content(server), time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, LOOK_SECONDS))
        if _content(server) != before:
            return


def _content(server: str) -> str | None:
    try:
        return Path(server).read_text(encoding="utf-8") if server.endswith(SUFFIX) else None
    except OSError:
        return None


def look_up(server: str) -> str:
    """host:port of the server, read from its file if `server` names one.

    Raises ServerAway where there is no such file, RunOver where it says that the run is complete.
    """
    if not server.endswith(SUFFIX):
        return server
    try:
        address = Path(server).read_text(encoding="utf-8").strip()
    except OSError:
        raise ServerAway(f"{server}: no such file; is the server running, and is this its run folder?") from None
    if address == COMPLETE:
        raise RunOver(f"{server}: the run is complete; nothing is left to do")
    return address
