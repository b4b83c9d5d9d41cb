"""A timeline of one rank in Chrome's trace format: open the file in https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

BODY = "body"
"""The track of what the rank itself does; every client has a track of its own."""


class Trace:
    """Writes spans as they end; without a path it does nothing.

    The file is a JSON array that viewers also read when it was cut short: a run that dies leaves a timeline.
    """

    def __init__(self, path: Path | None, rank: int = 0) -> None:
        self._path = path
        self._rank = rank
        self._file: IO[str] | None = None
        self._tracks: dict[str, int] = {}
        self._origin = time.monotonic()

    def close(self) -> None:
        """End the file."""
        if self._file is not None:
            self._file.write("{}]\n")
            self._file.close()
        self._file = self._path = None

    @contextmanager
    def span(self, name: str, **details: Any) -> Iterator[None]:
        """What happens inside, on the body's track."""
        started = time.monotonic()
        yield
        self.add(name, started, time.monotonic(), **details)

    def add(self, name: str, started: float, ended: float, track: str = BODY, **details: Any) -> None:
        """A span from `started` to `ended`, seconds of time.monotonic()."""
        if self._path is None:
            return
        if track not in self._tracks:
            self._tracks[track] = len(self._tracks)
            self._write({"ph": "M", "name": "thread_name", "tid": self._tracks[track], "args": {"name": track}})
        # Round trips of a client overlap, so they are asynchronous events; the body does one thing at a time.
        place: dict[str, Any] = {"tid": self._tracks[track], "name": name}
        if track == BODY:
            duration = {"dur": 1e6 * (ended - started)}
            self._write({"ph": "X", "ts": self._microseconds(started), **duration, **place, "args": details})
            return
        identity = {"cat": track, "id": f"{track} {name} {details}"}
        self._write({"ph": "b", "ts": self._microseconds(started), **identity, **place, "args": details})
        self._write({"ph": "e", "ts": self._microseconds(ended), **identity, **place})

    def _microseconds(self, moment: float) -> float:
        return round(1e6 * (moment - self._origin), 1)

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is None:
            assert self._path is not None
            self._file = self._path.open("w", encoding="utf-8", buffering=1 << 16)
            self._file.write("[\n")
            self._write({"ph": "M", "name": "process_name", "args": {"name": f"rank {self._rank}"}})
        self._file.write(json.dumps({"pid": self._rank, **event}) + ",\n")
