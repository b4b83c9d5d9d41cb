"""A rank's timeline in Chrome's trace format: open it in https://ui.perfetto.dev."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

BODY = "body"
"""The track of what the rank itself does; every client has a track of its own."""

NOTHING = nullcontext()
"""A span that is not written: most runs have no trace, and each event has a span."""


class Trace:
    """Writes spans as they end; without a path it does nothing.

    Viewers read the JSON array even if it is cut short: a run that dies leaves a timeline.
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

    def span(self, name: str, **details: Any) -> AbstractContextManager[None]:
        """What happens inside, on the body's track."""
        return NOTHING if self._path is None else self._timed(name, details)

    @contextmanager
    def _timed(self, name: str, details: dict[str, Any]) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.add(name, started, time.monotonic(), **details)

    def add(self, name: str, started: float, ended: float, **details: Any) -> None:
        """A span on the body's track from `started` to `ended`, seconds of time.monotonic()."""
        if self._path is None:
            return
        span = {"ph": "X", "ts": self._microseconds(started), "dur": 1e6 * (ended - started)}
        self._write({**span, "tid": self._track(BODY), "name": name, "args": details})

    def begin(self, name: str, track: str, **details: Any) -> None:
        """Begin a span on another track, where spans may overlap; `end` ends it, same arguments."""
        self._mark("b", name, track, details)

    def end(self, name: str, track: str, **details: Any) -> None:
        """A span that `begin` began ends now."""
        self._mark("e", name, track, details)

    def _mark(self, phase: str, name: str, track: str, details: dict[str, Any]) -> None:
        if self._path is None:
            return
        identity = {"cat": track, "id": f"{track} {name} {details}", "tid": self._track(track), "name": name}
        self._write({"ph": phase, "ts": self._microseconds(time.monotonic()), **identity, "args": details})

    def _track(self, name: str) -> int:
        if name not in self._tracks:
            self._tracks[name] = len(self._tracks)
            self._write({"ph": "M", "name": "thread_name", "tid": self._tracks[name], "args": {"name": name}})
        return self._tracks[name]

    def _microseconds(self, moment: float) -> float:
        return round(1e6 * (moment - self._origin), 1)

    def _write(self, event: dict[str, Any]) -> None:
        if self._file is None:
            assert self._path is not None
            self._file = self._path.open("w", encoding="utf-8", buffering=1 << 16)
            self._file.write("[\n")
            self._write({"ph": "M", "name": "process_name", "args": {"name": f"rank {self._rank}"}})
        self._file.write(json.dumps({"pid": self._rank, **event}) + ",\n")
